"""Normalisers: the estimators of log Z, and the log partition of each sample.

Source: docs/reference/method.md, section 3.

population - the integral of exp(f(t)/beta) over (0, 1): the QRPO paper's. Right without ties at every n, and
    with ties for the `randomized` tie method, whose ranks are uniform.
tie_aware - the population's without ties; a reward that two references of a prompt share is counted as an
    atom (3.7, tie_aware.py). Equal rewards get target 0.
finite - the mean over k = 0..n of exp(f(k/n)/beta), n the sample's own: 1 = E_ref exp(target/beta) without
    ties (3.1, 3.2), where the fitted policy's own mean is below 1 (3.5).
empirical - log mean exp(f/beta) over the references of the sample's prompt, ranked leave-one-out among
    themselves under the sample's tie method (3.4): adapts to ties; without them it is `finite`.
auto - tie_aware (`AUTO`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, IntArray, finite_rewards, integers, listed, same_length
from qrpo_core.objective.log_partition import finite_sums, segment_sums
from qrpo_core.objective.quantiles import RankCounts, TieMethod, leave_one_out_counts, quantile, tie_rate
from qrpo_core.objective.references import group_by_prompt, known_positions
from qrpo_core.objective.tie_aware import quantile_pieces, tie_aware_sums
from qrpo_core.objective.transforms import RewardTransform

Normaliser = Literal["population", "finite", "empirical", "tie_aware"]
NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)

AUTO: Normaliser = "tie_aware"
"""What `auto` names, and the one place that decides it. It is the population's Z where no rewards tie; which
normaliser gives the best policy where many do is a measured question (docs/reference/method.md, 3.8)."""

TIE_TOLERANCE = 0.01
"""Share of tied references up to which `population` and `finite` are accepted: a few duplicate completions
among continuous rewards do not move Z."""

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class References:
    """Reference rewards [references] by prompt code, and the seeds that randomise their ranks."""

    prompt: IntArray
    rewards: FloatArray
    seeds: NDArray[np.uint64] | None


def references_of(
    prompt: ArrayLike | None, rewards: ArrayLike | None, seeds: NDArray[np.uint64] | None
) -> References | None:
    """The references, checked; None if no column of them is given."""
    if prompt is None and rewards is None:
        return None
    if prompt is None or rewards is None:
        raise ObjectiveError(
            "reference_prompt and reference_rewards go together", remedy="pass both or neither"
        )
    codes = integers(prompt, what="reference prompt codes")
    values = finite_rewards(rewards, what="reference rewards")
    same_length(reference_prompt=codes, reference_rewards=values, reference_seeds=seeds)
    return References(codes, values, seeds)


def check_minimum(transform: RewardTransform, n: IntArray, prompt: IntArray | None, what: str) -> None:
    """Raise ObjectiveError, with the prompts, where there are fewer references than the transform needs."""
    short = n < transform.min_references
    if short.any():
        where = None if prompt is None else f"prompt codes {listed(np.unique(prompt[short]))}, {what}"
        transform.check_references(n, where=where)


def choose_normaliser(
    normaliser: Normaliser | Literal["auto"],
    tie_method: TieMethod,
    references: References | None,
    counts: RankCounts,
    tolerance: float,
) -> Normaliser:
    """The normaliser to use, `auto` resolved; refused where ties break it under this tie method."""
    if normaliser not in (*NORMALISERS, "auto"):
        raise ObjectiveError(f"unknown normaliser {normaliser!r}", remedy=f"auto, {', '.join(NORMALISERS)}")
    if normaliser == "auto":
        required(references, "reference_prompt and reference_rewards", "the auto normaliser")
        return AUTO
    if normaliser in ("empirical", "tie_aware"):
        return normaliser
    if normaliser == "population" and tie_method == "randomized":
        return "population"  # a randomised rank is uniform, ties or not
    if references is not None:
        tied = tie_rate(references.prompt, references.rewards)
    else:
        tied = float((counts.equal > 0).mean()) if len(counts) else 0.0
    if tied > tolerance:
        raise ObjectiveError(
            f"the {normaliser} normaliser does not fit the {tie_method} tie method where rewards tie: "
            f"{tied:.1%} of them are tied (tolerance {tolerance:.1%})",
            remedy="use normaliser 'tie_aware' (or 'population' with tie method 'randomized'); "
            "tie_tolerance = 1 keeps the published pairing, whose log Z is wrong there",
        )
    return normaliser


def log_partition_parts(
    normaliser: Normaliser,
    transform: RewardTransform,
    beta: FloatArray,
    tie_method: TieMethod,
    n: IntArray,
    prompt: IntArray | None,
    references: References | None,
) -> tuple[FloatArray, FloatArray]:
    """log Z of each sample as (max, rest) with log Z = max/beta + rest; all columns [samples]."""
    if normaliser == "population":
        return np.zeros_like(beta), _population(transform, beta, prompt)
    if normaliser == "finite":
        return _finite(transform, beta, n, prompt)
    if normaliser == "tie_aware":
        codes, given = required_references(prompt, references, "the tie_aware normaliser")
        pieces = quantile_pieces(given.prompt, given.rewards)
        return tie_aware_sums(pieces, transform, beta, tie_method, n, codes)
    return _empirical(transform, beta, tie_method, prompt, references)


def _population(transform: RewardTransform, beta: FloatArray, prompt: IntArray | None) -> FloatArray:
    if transform.varies_by_prompt:
        codes = required(prompt, "prompt", "a transform that varies by prompt")
        return transform.at(codes).log_partition(beta)
    distinct, inverse = np.unique(beta, return_inverse=True)
    return np.atleast_1d(transform.log_partition(distinct))[inverse]


def _finite(
    transform: RewardTransform, beta: FloatArray, n: IntArray, prompt: IntArray | None
) -> tuple[FloatArray, FloatArray]:
    if transform.varies_by_prompt:
        return finite_sums(transform, beta, n, prompt)
    # (n, beta) takes few values: one sum for each pair.
    betas, which = np.unique(beta, return_inverse=True)
    keys, inverse = np.unique(n * len(betas) + which, return_inverse=True)
    top, rest = finite_sums(transform, betas[keys % len(betas)], keys // len(betas))
    return top[inverse], rest[inverse]


def _empirical(
    transform: RewardTransform,
    beta: FloatArray,
    tie_method: TieMethod,
    prompt: IntArray | None,
    references: References | None,
) -> tuple[FloatArray, FloatArray]:
    """log mean exp(f/beta) over the references of each sample's prompt, as (max, rest).

    Source: docs/reference/method.md, section 3.4.
    """
    codes, given = required_references(prompt, references, "the empirical normaliser")
    groups = group_by_prompt(given.prompt)
    single = groups.codes[groups.counts < 2]
    if len(single):
        raise ObjectiveError(
            f"{len(single)} prompts have one reference, which cannot be ranked with itself left out",
            where=f"prompt codes {listed(single)}",
            remedy="draw at least two references for each prompt, or use normaliser 'tie_aware'",
        )
    where = known_positions(groups, codes)
    ranks = leave_one_out_counts(given.prompt, given.rewards)
    check_minimum(transform, ranks.n, given.prompt, "references left when one is ranked")
    q = quantile(ranks.below, ranks.equal, ranks.n, tie_method, given.seeds)
    values = groups.gather(transform.at(given.prompt).apply(q, ranks.n))
    if len(beta) and (beta == beta[0]).all():  # one beta: one sum for each prompt instead of each sample
        used, inverse = np.unique(where, return_inverse=True)
        top, rest = segment_sums(values, groups.offsets, used, np.full(len(used), beta[0]))
        return top[inverse], rest[inverse]
    return segment_sums(values, groups.offsets, where, beta)


def required_references(
    prompt: IntArray | None, references: References | None, what: str
) -> tuple[IntArray, References]:
    """Both; raises ObjectiveError if one is None."""
    codes = required(prompt, "prompt", what)
    return codes, required(references, "reference_prompt and reference_rewards", what)


def required(value: _T | None, name: str, what: str) -> _T:
    """value; raises ObjectiveError if it is None."""
    if value is None:
        raise ObjectiveError(f"{what} needs {name}", remedy=f"pass {name}")
    return value
