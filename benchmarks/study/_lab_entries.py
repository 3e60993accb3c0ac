"""The lab's questions, each a list of cells; a cell that two of them need is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from _lab_targets import Cell
from _lab_world import LAWS, Law

BETAS = (0.03, 0.1, 0.3)
FRONTIER = (0.03, 0.05, 0.1, 0.2, 0.3, 0.6)
SIZES = (4, 8, 16, 50)
VARIANTS = ("population", "finite", "empirical", "tie_aware", "shrunken", "shrunken_both")
#: Without ties `empirical` is `finite`, and every other estimate of log Z is `population`.
VARIANTS_WITHOUT_TIES = ("population", "finite")


TARGET_BETAS = {
    "best_of_n": (0.03, 0.05, 0.1, 0.2, 0.3, 0.6, 1.2),
    "tup": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0),
    "a_star": (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
}
"""The frontier of each objective with a target a completion; `a_star` has value_beta = beta."""
PAIR_BETAS = {
    "dpo": (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0),
    "rebel": (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0),
    "simpo": (0.3, 1.0, 2.0, 4.0, 8.0, 16.0),
}
"""The frontier of each objective of pairs; their betas mean other things than QRPO's."""
LONGER_BETAS = FRONTIER[1:5]
SHIFTS = (-1.0, 0.5, 1.0, 2.0)
#: Tie methods whose quantile is another; at n = 8.
OTHER_TIE_METHODS = ("randomized", "mid")


def variants(law: Law, n: int) -> tuple[str, ...]:
    """The variants that differ under a law; `true` depends on no n and is added apart."""
    if law == "continuous":
        return VARIANTS_WITHOUT_TIES
    return VARIANTS + OTHER_TIE_METHODS * (n == 8)


def bounds() -> Iterator[Cell]:
    """The reference policy and the optimum, without any training."""
    for law in LAWS:
        for beta in FRONTIER:
            yield Cell(law=law, objective="reference", variant="", beta=beta)
            yield Cell(law=law, objective="optimum", variant="", beta=beta)


def normaliser(n: int) -> Iterator[Cell]:
    """(a) Which normaliser, along the frontier of betas, at n references a prompt."""
    for beta in BETAS if n == 16 else FRONTIER:
        for law in LAWS:
            yield Cell(law=law, beta=beta, n=8, variant="true")
            for variant in variants(law, n):
                yield Cell(law=law, beta=beta, n=n, variant=variant)


def candidates() -> Iterator[Cell]:
    """(a) More candidates where rewards tie: log Z pooled over prompts, shrunken masses, mid ranks."""
    for n in (8, 4, 50):
        for beta in FRONTIER:
            for law in LAWS[1:]:
                for variant in ("pooled", "shrunken_pooled", "shrunken_mid"):
                    yield Cell(law=law, beta=beta, n=n, variant=variant)
                yield Cell(law=law, beta=beta, variant="true_mid")


def mid_ranks() -> Iterator[Cell]:
    """(a) The tie method mid with two normalisers of the project."""
    for n in (8, 4, 50):
        for beta in FRONTIER:
            for law in LAWS[1:]:
                for variant in ("mid_tie_aware", "mid_population"):
                    yield Cell(law=law, beta=beta, n=n, variant=variant)


def shifts() -> Iterator[Cell]:
    """(a) All targets moved by a constant: log Z less by so many nats."""
    for beta in FRONTIER:
        for law in LAWS:
            for nats in SHIFTS:
                yield Cell(law=law, beta=beta, variant=f"tie_aware+{nats}")


def longer() -> Iterator[Cell]:
    """(a) What a training of other length is compared on."""
    for law in LAWS[1:]:
        for beta in LONGER_BETAS:
            for variant in ("population", "tie_aware", "mid_tie_aware"):
                yield Cell(law=law, beta=beta, variant=variant)


def confirm() -> Iterator[Cell]:
    """(a) The choice between tie methods and normalisers, on worlds that the choice has not seen."""
    for n in (8, 4, 50):
        for law in LAWS[1:]:
            for beta in FRONTIER:
                for variant in ("population", "tie_aware", "mid_tie_aware"):
                    yield Cell(law=law, beta=beta, n=n, variant=variant)


def precomputation() -> Iterator[Cell]:
    """(b) More references a prompt: completions of the reference policy, and those of a better one."""
    for beta in (0.01, *BETAS):
        for n in (2, *SIZES):
            yield Cell(law="continuous", beta=beta, n=n, trained=2)
        for n in (1, 2, *SIZES):
            yield Cell(law="continuous", beta=beta, n=n, trained=2, mode="offline")
        for mode in ("random", "offline"):
            yield Cell(law="continuous", beta=beta, trained=2, mode=mode, variant="true")


def threshold() -> Iterator[Cell]:
    """(c) The threshold beta log Z, the share of targets above it, the optimum and what is learned."""
    for beta in (0.01, 0.03, 0.1, 0.3, 1.0):
        yield Cell(law="continuous", objective="optimum", variant="", beta=beta)
        for n in (4, 8, 16, 50):
            yield Cell(law="continuous", beta=beta, n=n)
        yield Cell(law="continuous", beta=beta, variant="true")


def best_worst() -> Iterator[Cell]:
    """(d) The best and the worst of six: references from outside the six, or among them."""
    for law in ("continuous", "graded"):
        for beta in (0.03, 0.1):
            for n in (12, 16, 50):
                for ranks in ("disjoint", "left_out", "plain"):
                    yield Cell(
                        law=law,
                        beta=beta,
                        n=n,
                        trained=2,
                        mode="best_worst",
                        ranks=ranks,
                        variant="tie_aware",
                    )
                yield Cell(law=law, beta=beta, n=n, trained=2, variant="tie_aware")
            yield Cell(law=law, beta=beta, trained=2, mode="best_worst", variant="true")
        for beta in FRONTIER:
            for ranks in ("disjoint", "left_out", "plain"):
                yield Cell(
                    law=law, beta=beta, n=16, trained=2, mode="best_worst", ranks=ranks, variant="tie_aware"
                )
            yield Cell(law=law, beta=beta, n=16, trained=2, variant="tie_aware")


def leave_one_out() -> Iterator[Cell]:
    """(e) A trained completion ranked among the others, or among all with itself."""
    for law in ("continuous", "graded", "binary"):
        for n in SIZES:
            for beta in FRONTIER if n in (4, 8) else BETAS:
                for ranks in ("left_out", "plain"):
                    yield Cell(law=law, beta=beta, n=n, ranks=ranks, variant="tie_aware")


def label_noise() -> Iterator[Cell]:
    """(f) Quantile and log Z estimated, one of them known, both known."""
    for law in ("continuous", "graded", "binary"):
        for beta in BETAS:
            for n in SIZES:
                known_apart = ("true_log_z", "true_quantile") if law != "continuous" else ()
                for variant in ("tie_aware", *known_apart):
                    yield Cell(law=law, beta=beta, n=n, variant=variant)
            yield Cell(law=law, beta=beta, variant="true")


def objectives() -> Iterator[Cell]:
    """(g) Other objectives on the same samples, along a frontier of their own betas."""
    for law in LAWS:
        for objective, betas in TARGET_BETAS.items():
            for beta in betas:
                yield Cell(law=law, objective=objective, variant="tie_aware", beta=beta)
        yield Cell(law=law, objective="sft", variant="", beta=0.1)
        for objective, betas in PAIR_BETAS.items():
            for beta in betas:
                yield Cell(law=law, objective=objective, variant="", beta=beta)


ENTRIES: dict[str, Callable[[], Iterator[Cell]]] = {
    "bounds": bounds,
    "normaliser_n8": partial(normaliser, 8),
    "label_noise": label_noise,
    "candidates": candidates,
    "precomputation": precomputation,
    "best_worst": best_worst,
    "leave_one_out": leave_one_out,
    "objectives": objectives,
    "threshold": threshold,
    "normaliser_n4": partial(normaliser, 4),
    "normaliser_n50": partial(normaliser, 50),
    "normaliser_n16": partial(normaliser, 16),
    "mid_ranks": mid_ranks,
    "shifts": shifts,
    "longer": longer,
    "confirm": confirm,
}
