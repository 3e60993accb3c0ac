"""The tables of docs/concepts/lab.md from the lab's result files, each between its two comments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from _lab_entries import BETAS, FRONTIER, LONGER_BETAS, PAIR_BETAS, SHIFTS, SIZES, TARGET_BETAS
from _lab_results import (
    Levels,
    Results,
    at_equal_kl,
    difference,
    shown_difference,
    shown_mean,
    table,
    with_tables,
)
from _lab_targets import Cell
from _lab_world import LAWS, Floats, Law
from _result import ROOT

PAGE = ROOT / "docs" / "concepts" / "lab.md"
#: Nats at which policies are compared. Binary rewards: no more than 1.2 is reached by all.
KL_LEVELS: dict[Law, tuple[float, ...]] = {
    "continuous": (0.5, 1.0, 2.0),
    "clipped": (0.5, 1.0, 2.0),
    "graded": (0.5, 1.0, 2.0),
}
KL_LEVELS["binary"] = (0.3, 0.6, 1.2)
RANKS = ("disjoint", "left_out", "plain")
#: What the columns are called; the page explains them.
NAMES = {
    "pooled": "pooled log Z",
    "shrunken": "shrunken log Z",
    "shrunken_both": "shrunken",
    "shrunken_mid": "shrunken, mid",
    "shrunken_pooled": "shrunken, pooled log Z",
    "mid_tie_aware": "tie_aware, mid",
    "mid": "empirical, mid",
    "mid_population": "population, mid",
    "randomized": "population, randomized",
    "true": "true targets",
    "true_mid": "true targets, mid",
} | {f"tie_aware+{nats}": f"targets {nats:+} nats" for nats in SHIFTS}


def same_beta(results: Results) -> str:
    """E[R_q] - beta KL (and reward / KL) at n = 8, as in method.md's prototype."""
    shown = ("population", "finite", "empirical", "tie_aware", "shrunken_both", "mid_tie_aware", "true")
    rows = []
    for law in LAWS:
        for beta in BETAS:
            found = [results.variant(each, law, beta, 8) for each in shown]
            best = results[Cell(law=law, objective="optimum", variant="", beta=beta)]
            start = results.reference(law)["quantile"].mean()
            cells = [
                f"{each['objective'].mean():.3f} ({each['reward'].mean():.2f} / {each['kl'].mean():.2f})"
                for each in found
            ]
            rows.append([f"{law}, {beta}", f"{start:.3f}", *cells, f"{best['objective'].mean():.3f}"])
    return table(["rewards, beta", "reference", *(NAMES.get(each, each) for each in shown), "optimum"], rows)


def by_n(results: Results) -> str:
    """Paired differences of the objective to tie_aware at the same beta."""
    shown = ("population", "finite", "empirical", "shrunken", "shrunken_both", "true")
    rows = []
    for law in LAWS:
        for beta in BETAS:
            for n in SIZES:
                base = results.variant("tie_aware", law, beta, n)["objective"]
                cells = [results.variant(each, law, beta, n)["objective"] - base for each in shown]
                same = [np.ptp(each) == 0 and each[0] == 0 for each in cells]
                rows.append(
                    [f"{law}, {beta}", str(n), f"{base.mean():.3f}"]
                    + ["same" if none else difference(each) for each, none in zip(cells, same, strict=True)]
                )
    columns = ["rewards, beta", "n", "tie_aware", *(NAMES.get(each, each) for each in shown)]
    return table(columns, rows)


def equal_kl(results: Results) -> str:
    """Paired differences of the reward to tie_aware at equal KL, with n = 4, 8 and 50."""
    shown = ("population", "finite", "empirical", "pooled", "shrunken", "shrunken_both", "shrunken_mid")
    shown += ("mid_tie_aware", "true", "true_mid")
    return _beside_tie_aware(results, shown, (4, 8, 50))


def other_variants(results: Results) -> str:
    """The same at n = 8 for more variants."""
    shown = ("mid", "mid_population", "randomized", "shrunken_pooled")
    return _beside_tie_aware(results, shown, (8,), LAWS[1:])


def shifts(results: Results) -> str:
    """The same for all targets moved by a constant, at n = 8."""
    return _beside_tie_aware(results, tuple(f"tie_aware+{nats}" for nats in SHIFTS), (8,))


def longer(results: Results) -> str:
    """The same at n = 8 for policies trained twice as long."""
    longer = Results(results.folder / "lab_20_epochs")
    return _beside_tie_aware(longer, ("population", "mid_tie_aware"), (8,), LAWS[1:], LONGER_BETAS)


def confirmed(results: Results) -> str:
    """The same on 20 other worlds, at n = 4, 8 and 50."""
    fresh = Results(results.folder / "lab_from_seed_20")
    return _beside_tie_aware(fresh, ("population", "mid_tie_aware"), (4, 8, 50), LAWS[1:])


def _beside_tie_aware(
    results: Results,
    shown: tuple[str, ...],
    sizes: tuple[int, ...],
    laws: tuple[Law, ...] = LAWS,
    betas: tuple[float, ...] = FRONTIER,
) -> str:
    rows = []
    for law in laws:
        for n in sizes:
            base = _curve(results, "tie_aware", law, n, KL_LEVELS[law], betas)
            found = [_curve(results, each, law, n, KL_LEVELS[law], betas) - base for each in shown]
            for place, level in enumerate(KL_LEVELS[law]):
                row = [f"{law}, {n}", f"{level}", shown_mean(base[place])]
                rows.append(row + [shown_difference(off[place]) for off in found])
    return table(["rewards, n", "KL", "tie_aware", *(NAMES.get(each, each) for each in shown)], rows)


def _curve(
    results: Results, variant: str, law: Law, n: int, levels: Levels, betas: tuple[float, ...] = FRONTIER
) -> Floats:
    """The reward at each KL level on a variant's frontier; without ties that of the variant it equals."""
    if law == "continuous" and "+" not in variant:
        variant = {"finite": "finite", "empirical": "finite"}.get(variant, variant)
        variant = variant.removesuffix("_mid") if variant == "true_mid" else variant
        variant = variant if variant in ("finite", "true") else "population"
    n = 8 if variant.startswith("true") else n
    return at_equal_kl(results, [Cell(law=law, beta=beta, n=n, variant=variant) for beta in betas], levels)


def precomputation(results: Results) -> str:
    """(b) The objective by n, with intervals of the gain over the smallest n."""
    rows = []
    for mode, sizes in (("random", (2, *SIZES)), ("offline", (1, 2, *SIZES))):
        for beta in (0.01, *BETAS):
            base = Cell(law="continuous", beta=beta, trained=2, mode=mode)
            cells = {n: results[replace(base, n=n)]["objective"] for n in sizes}
            known = results[replace(base, variant="true")]["objective"]
            row = [f"{'reference' if mode == 'random' else 'better'} policy, {beta}"]
            row += [f"{cells[n].mean():.3f}" if n in cells else "" for n in (1, 2, *SIZES)]
            row += [difference(cells[50] - cells[2]), difference(known - cells[50])]
            rows.append(row)
    columns = [
        "completions of, beta",
        *(f"n = {n}" for n in (1, 2, *SIZES)),
        "50 over 2",
        "true targets over 50",
    ]
    return table(columns, rows)


def threshold(results: Results) -> str:
    """(c) The threshold, the share of positive targets, right signs, and KL and E[R_q] beside the optimum."""
    rows = []
    for beta in (0.01, 0.03, 0.1, 0.3, 1.0):
        log_z = 1 / beta + np.log(beta) + np.log1p(-np.exp(-1 / beta))
        best = results[Cell(law="continuous", objective="optimum", variant="", beta=beta)]
        known = results[Cell(law="continuous", beta=beta, variant="true")]
        some = [results[Cell(law="continuous", beta=beta, n=n)] for n in SIZES]
        rows.append(
            [f"{beta}", f"{100 * beta * log_z:.1f} %"]
            + [f"{100 * (1 - each['positive'].mean()):.1f} %" for each in some]
            + [f"{100 * each['sign_right'].mean():.0f} %" for each in some]
            + [f"{each['kl'].mean():.2f}, {each['quantile'].mean():.3f}" for each in (best, known, some[-1])]
        )
    columns = ["beta", "threshold beta log Z"]
    columns += [f"pushed down, n = {n}" for n in SIZES] + [f"sign right, n = {n}" for n in SIZES]
    return table([*columns, "KL, E[R_q] of the optimum", "with true targets", "with n = 50"], rows)


def best_worst(results: Results) -> str:
    """(d) best_worst by where its references come from, at the same beta and at equal KL."""
    rows = []
    for law in ("continuous", "graded"):
        for beta in (0.03, 0.1):
            for n in (12, 16, 50):
                base = Cell(law=law, beta=beta, n=n, trained=2, variant="tie_aware")
                cells = [replace(base, mode="best_worst", ranks=ranks) for ranks in RANKS]
                found = [results[each]["objective"] for each in (*cells, base)]
                row = [f"{law}, {n}", f"beta {beta}, objective", shown_mean(found[0])]
                rows.append(row + [difference(each - found[0]) for each in found[1:]])
        base = Cell(law=law, n=16, trained=2, variant="tie_aware")
        sources = [replace(base, mode="best_worst", ranks=ranks) for ranks in RANKS] + [base]
        rows += _frontiers(results, f"{law}, 16", sources)
    columns = ["rewards, n", "at", "disjoint", "left out", "counted among its own"]
    return table([*columns, "two at random instead"], rows)


def leave_one_out(results: Results) -> str:
    """(e) A completion left out of its own references, and counted among them, at the same beta."""
    rows = []
    for law in ("continuous", "graded", "binary"):
        for beta in BETAS:
            row = [f"{law}, {beta}"]
            for n in SIZES:
                base = Cell(law=law, beta=beta, n=n, variant="tie_aware")
                off = results[replace(base, ranks="plain")]["objective"] - results[base]["objective"]
                row.append(difference(off))
            rows.append(row)
    return table(["rewards, beta", *(f"n = {n}" for n in SIZES)], rows)


def leave_one_out_at_equal_kl(results: Results) -> str:
    """(e) The same in reward at equal KL."""
    rows = []
    for law in ("continuous", "graded", "binary"):
        for n in (4, 8):
            base = Cell(law=law, n=n, variant="tie_aware")
            rows += _frontiers(results, f"{law}, {n}", [base, replace(base, ranks="plain")])
    return table(["rewards, n", "at", "left out", "counted among its own"], rows)


def _frontiers(results: Results, name: str, sources: list[Cell]) -> list[list[str]]:
    """A row for each KL level: the first cell's reward along its betas, and differences of the others."""
    law = sources[0].law
    curves = [
        at_equal_kl(results, [replace(cell, beta=beta) for beta in FRONTIER], KL_LEVELS[law])
        for cell in sources
    ]
    return [
        [name, f"KL {level}, reward", shown_mean(curves[0][place])]
        + [shown_difference(each[place] - curves[0][place]) for each in curves[1:]]
        for place, level in enumerate(KL_LEVELS[law])
    ]


def label_noise(results: Results) -> str:
    """(f) What is lost to the true targets: estimated both, quantile only, log Z only; noise in nats."""
    rows = []
    for law in ("continuous", "graded", "binary"):
        for beta in BETAS:
            known = results[Cell(law=law, beta=beta, variant="true")]["objective"]
            for n in SIZES:
                base = Cell(law=law, beta=beta, n=n, variant="tie_aware")
                found = results[base]
                row = [
                    f"{law}, {beta}",
                    str(n),
                    f"{found['bias'].mean():+.2f}",
                    f"{found['noise'].mean():.2f}",
                ]
                row.append(difference(found["objective"] - known))
                for variant in ("true_log_z", "true_quantile"):
                    apart = law != "continuous"
                    row.append(
                        difference(results[replace(base, variant=variant)]["objective"] - known)
                        if apart
                        else ""
                    )
                rows.append(row)
    columns = ["rewards, beta", "n", "bias, nats", "noise, nats"]
    return table([*columns, "both estimated", "log Z known", "quantile known"], rows)


def objectives(results: Results, measure: str = "reward") -> str:
    """(g) A measure of other objectives at equal KL, less that of QRPO with tie_aware; the same samples.

    qrpo, mid: QRPO under mid ranks.
    """
    rows = []
    for law in LAWS:
        curves = []
        for variant in ("tie_aware", "mid_tie_aware"):
            name = "population" if law == "continuous" else variant
            cells = [Cell(law=law, variant=name, beta=beta) for beta in FRONTIER]
            curves.append(at_equal_kl(results, cells, KL_LEVELS[law], measure))
        base, others = curves[0], [curves[1] - curves[0]]
        for variant, scales in (("tie_aware", TARGET_BETAS), ("", PAIR_BETAS)):
            for name, betas in scales.items():
                cells = [Cell(law=law, objective=name, variant=variant, beta=beta) for beta in betas]
                others.append(at_equal_kl(results, cells, KL_LEVELS[law], measure) - base)
        for place, level in enumerate(KL_LEVELS[law]):
            off = [shown_difference(each[place]) for each in others]
            rows.append([law, f"{level}", shown_mean(base[place]), *off])
    return table(["rewards", "KL", "qrpo", "qrpo, mid", *TARGET_BETAS, *PAIR_BETAS], rows)


def imitation(results: Results) -> str:
    """(g) SFT on the best of 8, and QRPO with tie_aware at the KL that SFT reached."""
    rows = []
    for law in LAWS:
        found = results[Cell(law=law, objective="sft", variant="", beta=0.1)]
        at_its_kl = _curve(results, "tie_aware", law, 8, found["kl"][None])[0]
        kl, reward = (f"{found[name].mean():.3f}" for name in ("kl", "reward"))
        start = f"{results.reference(law)['reward'].mean():.3f}"
        rows.append([law, start, kl, reward, difference(found["reward"] - at_its_kl)])
    return table(["rewards", "reference's reward", "KL of SFT", "its reward", "less QRPO's at that KL"], rows)


TABLES = {
    "same_beta": same_beta,
    "by_n": by_n,
    "equal_kl": equal_kl,
    "other_variants": other_variants,
    "shifts": shifts,
    "longer": longer,
    "confirmed": confirmed,
    "precomputation": precomputation,
    "threshold": threshold,
    "best_worst": best_worst,
    "leave_one_out": leave_one_out,
    "leave_one_out_at_equal_kl": leave_one_out_at_equal_kl,
    "label_noise": label_noise,
    "objectives": objectives,
    "objectives_quantile": lambda results: objectives(results, "quantile"),
    "imitation": imitation,
}


def rendered(page: str, results: Results) -> str:
    """The page with every table between `<!-- lab: NAME -->` and `<!-- end -->` made anew."""
    return with_tables(page, "lab", lambda name: TABLES[name](results))


def write_page(folder: Path) -> None:
    """Write the page's tables from the files of a folder."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rendered(text, Results(folder)), encoding="utf-8")
