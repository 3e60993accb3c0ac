"""The pool report as plain values, with a JSON form: what a pool says before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import with_config

from qrpo_core.evaluation.judge_agreement import Floats, JudgeAgreement, mid_rank
from qrpo_core.evaluation.plain import PlainResult
from qrpo_core.evaluation.results import Estimate
from qrpo_core.objective.allocation import quantile_standard_error
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.more_references import Signs, chance_of_signal, expected_signs
from qrpo_core.objective.optimum import Above, above, beta_for_share
from qrpo_core.objective.quantiles import RankCounts, leave_one_out_counts

#: The further references whose effect is shown.
ADDITIONAL = 10
#: The commonest rewards that are listed, and the groups of lengths.
_COMMON, _LENGTHS = 3, 10


@dataclass(frozen=True)
class RewardSpread:
    """The rewards of the pool.

    prompts, references : with a reward, of prompts with two or more. fewest, most : of a prompt.
    distinct : different rewards in the whole pool; common : the commonest, each with its share.
    tie_rate, largest_atom, signal_free_prompts, ceiling : see `objective.diagnostics.RewardDiagnostics`;
        floor is the ceiling of the negative reward.
    """

    prompts: int
    references: int
    fewest: int
    most: int
    distinct: int
    common: list[tuple[float, float]]
    tie_rate: float
    largest_atom: float
    signal_free_prompts: int
    floor: float
    ceiling: float


@dataclass(frozen=True)
class LengthFacts:
    """The reward beside the length of completions, within prompts.

    correlation : of reward with log length; None where one is constant. rank_correlation : of their ranks.
    groups : (mean tokens, mean quantile of the reward) of tenths of the length's rank.
    cut, completions : those that the length limit ended, of all rows. cut_quantile : mean quantile of those
        with a reward; None without any.
    """

    mean: float
    correlation: float | None
    rank_correlation: Estimate | None
    groups: list[tuple[float, float]]
    cut: int
    completions: int
    cut_quantile: float | None


@dataclass(frozen=True)
class SignFacts:
    """`objective.more_references.Signs` with None for nan."""

    right: float
    right_above: float | None
    above: float

    @classmethod
    def of(cls, signs: Signs) -> SignFacts:
        right_above = None if math.isnan(signs.right_above) else signs.right_above
        return cls(signs.right, right_above, signs.above)


@dataclass(frozen=True)
class MoreReferences:
    """What `additional` further references of every prompt are expected to change.

    error, error_then : mean standard error of a quantile, now and then. signs, signs_then : of the targets;
    None for an objective without quantiles. useful : prompts without signal that get one, in expectation.
    """

    additional: int
    error: float
    error_then: float
    signs: SignFacts | None
    signs_then: SignFacts | None
    useful: float


@dataclass(frozen=True)
class JudgedPool:
    """One judge on a sample of the pool.

    asked : rows; statuses : of those without a score, by status. agreement : None where too few have one.
    above : how the optimum spends its KL above `agreement.stops_rising`. least_beta : where half of it
    goes there. truncation : the lambda of TUP that this place suggests. None where the judge agrees up to the
    top or does not agree at all, or the objective has no such density.
    """

    asked: int
    statuses: dict[str, int]
    agreement: JudgeAgreement | None
    above: Above | None
    least_beta: float | None
    truncation: float | None


@with_config(extra="forbid", strict=True)
@dataclass(frozen=True)
class PoolReport(PlainResult):
    """Everything that the pool report shows.

    beta : of the objective; None if it has no density ratio on the quantile.
    """

    what, remedy = "a pool report", "make it again"

    name: str
    reward: str
    objective: str
    beta: float | None
    confidence: float
    statuses: dict[str, int]
    spread: RewardSpread
    length: LengthFacts
    more: MoreReferences
    judges: dict[str, JudgedPool]


def judged_pool(
    asked: int,
    statuses: dict[str, int],
    agreement: JudgeAgreement | None,
    *,
    ratio: DensityRatio | None,
    references: int,
) -> JudgedPool:
    """A judge's part of the report, with what its agreement means for the objective.

    ratio : None for an objective without a density ratio on the quantile. references : of a prompt.
    """
    place = None if agreement is None else agreement.stops_rising
    if agreement is None or place is None or not agreement.follows or not 0 < place.value < 1:
        return JudgedPool(asked, statuses, agreement, None, None, None)
    # Above a larger lambda a prompt has less than one reference in expectation.
    truncation = min(place.value, 1 - 1 / references)
    if ratio is None or not math.isfinite(ratio.transform.bounds[1]):
        return JudgedPool(asked, statuses, agreement, None, None, truncation)
    spent = above(ratio.transform, ratio.beta, place.value)
    least = beta_for_share(ratio.transform, place.value)
    return JudgedPool(asked, statuses, agreement, spent, least, truncation)


def more_references(prompt: Any, rewards: Floats, *, ratio: DensityRatio | None) -> MoreReferences:
    """What ADDITIONAL further references of every prompt would change. prompt, rewards : [references]."""
    counts = leave_one_out_counts(prompt, rewards)
    errors = quantile_standard_error(counts.below, counts.equal, counts.n)
    signs = [None if ratio is None else _signs(counts, ratio, more) for more in (0, ADDITIONAL)]
    return MoreReferences(
        additional=ADDITIONAL,
        error=float(errors.mean()),
        error_then=float((errors * np.sqrt(counts.n / (counts.n + ADDITIONAL))).mean()),
        signs=signs[0],
        signs_then=signs[1],
        useful=float(chance_of_signal(prompt, rewards, ADDITIONAL).sum()),
    )


def _signs(counts: RankCounts, ratio: DensityRatio, more: int) -> SignFacts:
    return SignFacts.of(expected_signs(counts, transform=ratio.transform, beta=ratio.beta, additional=more))


def common_rewards(rewards: Floats) -> tuple[int, list[tuple[float, float]]]:
    """(number of different rewards, the commonest with their shares), [references]."""
    values, counts = np.unique(rewards, return_counts=True)
    best = np.argsort(-counts, kind="stable")[:_COMMON]
    return len(values), [(float(values[at]), float(counts[at] / len(rewards))) for at in best]


def length_groups(prompt: Any, lengths: Floats, quantiles: Floats) -> list[tuple[float, float]]:
    """(mean tokens, mean quantile) of tenths of the length's rank within prompts, [references] each."""
    tenth = np.minimum((mid_rank(prompt, lengths) * _LENGTHS).astype(np.int64), _LENGTHS - 1)
    return [
        (float(lengths[tenth == at].mean()), float(quantiles[tenth == at].mean())) for at in np.unique(tenth)
    ]
