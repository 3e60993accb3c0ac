"""From rank counts to calibrated targets, in float64 and in one place.

    target = f(R_q) - beta log Z        reward units; target/beta = the log-ratio log pi/pi_ref, in nats

The target of the QRPO paper's loss (arXiv 2507.08068; method.md section 1), with the normaliser log Z
as an explicit choice that must fit the convention (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import (
    FloatArray,
    IntArray,
    finite_rewards,
    integers,
    listed,
    positive_beta,
    same_length,
)
from qrpo_core.objective.partition import finite_parts, segment_parts
from qrpo_core.objective.quantiles import (
    Convention,
    RankCounts,
    has_ties,
    leave_one_out_counts,
    quantile,
    tie_rate,
)
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.transform_base import RewardTransform

__all__ = [
    "NORMALISERS",
    "CalibratedTargets",
    "Normaliser",
    "calibrated_targets",
    "has_ties",
    "reference_targets",
]

Normaliser = Literal["population", "finite", "empirical"]
NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)

_T = TypeVar("_T")

TIE_TOLERANCE = 0.01
"""Tied share of the references up to which `population` and `finite` are accepted: a few duplicate
completions among continuous rewards do not move Z."""


@dataclass(frozen=True, eq=False)
class CalibratedTargets:
    """Targets of a table of samples; float64 columns [samples] and what they were made with.

    quantile : R_q in [0, 1]. transformed : f(R_q), reward units. beta : KL strength of each sample (reward
    units per nat; beta/length where lengths were given). log_partition : log Z in nats.
    target : f(R_q) - beta log Z, reward units.
    normaliser : the one used (`auto` resolved). beta_max_bound : samples whose beta was cut to beta_max.
    """

    quantile: FloatArray
    transformed: FloatArray
    beta: FloatArray
    log_partition: FloatArray
    target: FloatArray
    convention: Convention
    normaliser: Normaliser
    beta_max_bound: int

    @property
    def log_ratio(self) -> FloatArray:
        """target/beta: the log pi/pi_ref (nats) at which the loss is zero."""
        return self.target / self.beta

    @property
    def positive_share(self) -> float:
        """Share of the samples whose probability the loss raises (target > 0)."""
        return float((self.target > 0).mean()) if len(self.target) else float("nan")

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True, eq=False)
class _References:
    prompt: IntArray
    rewards: FloatArray
    seeds: NDArray[np.uint64] | None


def calibrated_targets(
    counts: RankCounts,
    *,
    transform: RewardTransform,
    beta: ArrayLike,
    convention: Convention = "weak",
    normaliser: Normaliser | Literal["auto"] = "auto",
    prompt: ArrayLike | None = None,
    reference_prompt: ArrayLike | None = None,
    reference_rewards: ArrayLike | None = None,
    seeds: NDArray[np.uint64] | None = None,
    reference_seeds: NDArray[np.uint64] | None = None,
    lengths: ArrayLike | None = None,
    beta_max: float | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> CalibratedTargets:
    """Calibrated targets f(R_q) - beta log Z of the samples behind `counts` (method.md sections 1, 3, 5).

    Parameters
    ----------
    counts : rank counts of the samples.
    transform : f. With parameters that vary by prompt, `prompt` codes are indices into them.
    beta : KL strength, > 0; a number or [samples].
    convention : weak (the paper's), mid, strict or randomized; see `quantile`.
    normaliser :
        population - the integral of exp(f(t)/beta): the paper's. Right without ties as n grows, and with
            ties for `randomized`.
        finite - the mean over k = 0..n of exp(f(k/n)/beta), n the sample's own: exact without ties.
        empirical - log mean exp(f/beta) over the prompt's own references ranked leave-one-out among
            themselves under the same convention: adapts to ties; a prompt with equal rewards gets target 0.
        auto - empirical if any two references of a prompt tie, else population.
    prompt : [samples] integer codes; for `empirical` and for transforms that vary by prompt.
    reference_prompt, reference_rewards : [references]; for `empirical` and `auto`, and to measure ties.
    seeds, reference_seeds : uint64 [samples], [references]; for `randomized`.
    lengths : [samples] tokens of each completion in the loss (end token included). Given, beta is
        divided by them and log Z is that of the divided beta.
    beta_max : largest beta/length. Not applied unless given; how often it binds is counted.
    tie_tolerance : tied share of the references above which `population` (unless `randomized`) and
        `finite` are refused. 1.0 accepts everything, for the published pairing on tied rewards.

    Raises
    ------
    ObjectiveError : a convention that does not fit the normaliser, fewer references than transform or
        normaliser need (prompts named), NaN rewards, beta <= 0, unequal lengths, missing arguments.
    """
    codes = None if prompt is None else integers(prompt, what="prompt codes")
    rows = same_length(counts=counts.n, prompt=codes)
    betas, bound = _betas(beta, lengths, beta_max, rows)
    references = _references(reference_prompt, reference_rewards, reference_seeds)
    _check_minimum(transform, counts.n, codes, "references")
    chosen = _resolve(normaliser, convention, references, counts, tie_tolerance)
    if transform.varies_by_prompt:
        transform_here = transform.at(_required(codes, "prompt", "a transform that varies by prompt"))
    else:
        transform_here = transform
    q = quantile(counts.below, counts.equal, counts.n, convention, seeds)
    transformed = transform_here.apply(q, counts.n)
    if chosen == "population":
        top, rest = np.zeros(rows), _population(transform_here, betas)
    elif chosen == "finite":
        top, rest = _finite(transform, betas, counts.n, codes)
    else:
        top, rest = _empirical(transform, betas, convention, codes, references)
    return CalibratedTargets(
        quantile=q,
        transformed=transformed,
        beta=betas,
        log_partition=top / betas + rest,
        # In this order equal rewards give (f - f) - beta * 0: exactly 0, not rounding noise.
        target=(transformed - top) - betas * rest,
        convention=convention,
        normaliser=chosen,
        beta_max_bound=bound,
    )


def reference_targets(
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    *,
    transform: RewardTransform,
    beta: ArrayLike,
    convention: Convention = "weak",
    normaliser: Normaliser | Literal["auto"] = "auto",
    reference_seeds: NDArray[np.uint64] | None = None,
    lengths: ArrayLike | None = None,
    beta_max: float | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> CalibratedTargets:
    """The targets that the references themselves would get, each left out of its own ranking.

    What `normalization_check` is run on. Arguments and errors as `calibrated_targets`; lengths [references].
    """
    return calibrated_targets(
        leave_one_out_counts(reference_prompt, reference_rewards),
        transform=transform,
        beta=beta,
        convention=convention,
        normaliser=normaliser,
        prompt=reference_prompt,
        reference_prompt=reference_prompt,
        reference_rewards=reference_rewards,
        seeds=reference_seeds,
        reference_seeds=reference_seeds,
        lengths=lengths,
        beta_max=beta_max,
        tie_tolerance=tie_tolerance,
    )


def _betas(
    beta: ArrayLike, lengths: ArrayLike | None, beta_max: float | None, rows: int
) -> tuple[FloatArray, int]:
    """Each sample's beta, and how many of them beta_max cuts (method.md section 5)."""
    given = positive_beta(beta)
    if given.ndim and given.shape != (rows,):
        raise ObjectiveError(f"beta has shape {given.shape}, there are {rows} samples")
    betas = np.broadcast_to(given, (rows,)).copy()
    if lengths is None:
        if beta_max is not None:
            raise ObjectiveError(
                f"beta_max = {beta_max} bounds beta/length, and no lengths are given",
                remedy="give lengths, or drop beta_max",
            )
        return betas, 0
    tokens = np.asarray(lengths)
    if tokens.shape != (rows,) or (tokens < 1).any():
        raise ObjectiveError(f"lengths must be {rows} token counts >= 1, got shape {tokens.shape}")
    betas /= tokens
    if beta_max is None:
        return betas, 0
    limit = float(positive_beta(beta_max))
    bound = betas > limit
    return np.where(bound, limit, betas), int(bound.sum())


def _references(
    prompt: ArrayLike | None, rewards: ArrayLike | None, seeds: NDArray[np.uint64] | None
) -> _References | None:
    if prompt is None and rewards is None:
        return None
    if prompt is None or rewards is None:
        raise ObjectiveError(
            "reference_prompt and reference_rewards go together", remedy="pass both or neither"
        )
    codes = integers(prompt, what="reference prompt codes")
    values = finite_rewards(rewards, what="reference rewards")
    same_length(reference_prompt=codes, reference_rewards=values, reference_seeds=seeds)
    return _References(codes, values, seeds)


def _check_minimum(transform: RewardTransform, n: IntArray, prompt: IntArray | None, what: str) -> None:
    short = n < transform.min_references
    if short.any():
        where = None if prompt is None else f"prompt codes {listed(np.unique(prompt[short]))}, {what}"
        transform.check_references(n, where=where)


def _resolve(
    normaliser: Normaliser | Literal["auto"],
    convention: Convention,
    references: _References | None,
    counts: RankCounts,
    tolerance: float,
) -> Normaliser:
    """The normaliser to use; refused where it is not the mean of exp(f/beta) under this convention."""
    if normaliser not in (*NORMALISERS, "auto"):
        raise ObjectiveError(f"unknown normaliser {normaliser!r}", remedy=f"auto, {', '.join(NORMALISERS)}")
    if normaliser == "empirical":
        return "empirical"
    if normaliser == "auto":
        held = _required(references, "reference_prompt and reference_rewards", "the auto normaliser")
        return "empirical" if has_ties(held.prompt, held.rewards) else "population"
    if normaliser == "population" and convention == "randomized":
        return "population"  # a randomised rank is uniform, ties or not
    if references is not None:
        tied = tie_rate(references.prompt, references.rewards)
    else:
        tied = float((counts.equal > 0).mean()) if len(counts) else 0.0
    if tied > tolerance:
        raise ObjectiveError(
            f"the {normaliser} normaliser does not fit the {convention} convention where rewards tie: "
            f"{tied:.1%} of them are tied (tolerance {tolerance:.1%})",
            remedy="use normaliser 'empirical' or 'auto' (or 'population' with convention 'randomized'); "
            "tie_tolerance = 1 keeps the published pairing, with E_ref exp(target/beta) far from 1",
        )
    return normaliser


def _population(transform: RewardTransform, beta: FloatArray) -> FloatArray:
    if transform.varies_by_prompt:
        return transform.log_partition(beta)
    distinct, inverse = np.unique(beta, return_inverse=True)
    return np.atleast_1d(transform.log_partition(distinct))[inverse]


def _finite(
    transform: RewardTransform, beta: FloatArray, n: IntArray, prompt: IntArray | None
) -> tuple[FloatArray, FloatArray]:
    if transform.varies_by_prompt:
        return finite_parts(transform, beta, n, prompt)
    # (n, beta) takes few values: one sum for each pair.
    betas, which = np.unique(beta, return_inverse=True)
    keys, inverse = np.unique(n * len(betas) + which, return_inverse=True)
    top, rest = finite_parts(transform, betas[keys % len(betas)], keys // len(betas))
    return top[inverse], rest[inverse]


def _empirical(
    transform: RewardTransform,
    beta: FloatArray,
    convention: Convention,
    prompt: IntArray | None,
    references: _References | None,
) -> tuple[FloatArray, FloatArray]:
    """log mean exp(f/beta) over the references of each sample's prompt, as (max, rest) (method.md 3.4)."""
    codes = _required(prompt, "prompt", "the empirical normaliser")
    held = _required(references, "reference_prompt and reference_rewards", "the empirical normaliser")
    groups = group_by_prompt(held.prompt)
    single = groups.codes[groups.counts < 2]
    if len(single):
        raise ObjectiveError(
            f"{len(single)} prompts have one reference, which cannot be ranked with itself left out",
            where=f"prompt codes {listed(single)}",
            remedy="draw at least two references for each prompt, or use normaliser 'finite' or 'population'",
        )
    where = groups.position(codes)
    if (where < 0).any():
        raise ObjectiveError(
            "samples of prompts without references",
            where=f"prompt codes {listed(np.unique(codes[where < 0]))}",
        )
    ranks = leave_one_out_counts(held.prompt, held.rewards)
    _check_minimum(transform, ranks.n, held.prompt, "references left when one is ranked")
    q = quantile(ranks.below, ranks.equal, ranks.n, convention, held.seeds)
    values = groups.gather(transform.at(held.prompt).apply(q, ranks.n))
    if len(beta) and (beta == beta[0]).all():  # one beta: one sum for each prompt instead of each sample
        used, inverse = np.unique(where, return_inverse=True)
        top, rest = segment_parts(values, groups.offsets, used, np.full(len(used), beta[0]))
        return top[inverse], rest[inverse]
    return segment_parts(values, groups.offsets, where, beta)


def _required(value: _T | None, name: str, what: str) -> _T:
    if value is None:
        raise ObjectiveError(f"{what} needs {name}", remedy=f"pass {name}")
    return value
