"""Normalisers: which log Z goes with a convention, and what it is for each sample (method.md section 3).

population - the integral of exp(f(t)/beta) over (0, 1): the QRPO paper's. Right without ties as n grows, and
    with ties for the `randomized` convention, whose ranks are uniform.
finite - the mean over k = 0..n of exp(f(k/n)/beta), n the sample's own: exact without ties (3.1, 3.2).
empirical - log mean exp(f/beta) over the references of the sample's prompt, ranked leave-one-out among
    themselves under the sample's convention (3.4): adapts to ties; equal rewards get target 0.
auto - empirical if any two references of a prompt tie, else population (3.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, IntArray, finite_rewards, integers, listed, same_length
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

Normaliser = Literal["population", "finite", "empirical"]
NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)

TIE_TOLERANCE = 0.01
"""Tied share of the references up to which `population` and `finite` are accepted: a few duplicate
completions among continuous rewards do not move Z."""

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
    """The references as one checked value, or None where they are not given."""
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
    """Refuse prompts with fewer references than the transform needs, naming them."""
    short = n < transform.min_references
    if short.any():
        where = None if prompt is None else f"prompt codes {listed(np.unique(prompt[short]))}, {what}"
        transform.check_references(n, where=where)


def resolve(
    normaliser: Normaliser | Literal["auto"],
    convention: Convention,
    references: References | None,
    counts: RankCounts,
    tolerance: float,
) -> Normaliser:
    """The normaliser to use; refused where it is not the mean of exp(f/beta) under this convention."""
    if normaliser not in (*NORMALISERS, "auto"):
        raise ObjectiveError(f"unknown normaliser {normaliser!r}", remedy=f"auto, {', '.join(NORMALISERS)}")
    if normaliser == "empirical":
        return "empirical"
    if normaliser == "auto":
        held = required(references, "reference_prompt and reference_rewards", "the auto normaliser")
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


def log_partition_parts(
    normaliser: Normaliser,
    transform: RewardTransform,
    beta: FloatArray,
    convention: Convention,
    n: IntArray,
    prompt: IntArray | None,
    references: References | None,
) -> tuple[FloatArray, FloatArray]:
    """log Z of each sample as (max, rest): log Z = max/beta + rest; all columns [samples]."""
    if normaliser == "population":
        return np.zeros_like(beta), _population(transform, beta, prompt)
    if normaliser == "finite":
        return _finite(transform, beta, n, prompt)
    return _empirical(transform, beta, convention, prompt, references)


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
    references: References | None,
) -> tuple[FloatArray, FloatArray]:
    """log mean exp(f/beta) over the references of each sample's prompt, as (max, rest) (method.md 3.4)."""
    codes = required(prompt, "prompt", "the empirical normaliser")
    held = required(references, "reference_prompt and reference_rewards", "the empirical normaliser")
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
    check_minimum(transform, ranks.n, held.prompt, "references left when one is ranked")
    q = quantile(ranks.below, ranks.equal, ranks.n, convention, held.seeds)
    values = groups.gather(transform.at(held.prompt).apply(q, ranks.n))
    if len(beta) and (beta == beta[0]).all():  # one beta: one sum for each prompt instead of each sample
        used, inverse = np.unique(where, return_inverse=True)
        top, rest = segment_parts(values, groups.offsets, used, np.full(len(used), beta[0]))
        return top[inverse], rest[inverse]
    return segment_parts(values, groups.offsets, where, beta)


def required(value: _T | None, name: str, what: str) -> _T:
    """value, or an error that says what needs it."""
    if value is None:
        raise ObjectiveError(f"{what} needs {name}", remedy=f"pass {name}")
    return value
