"""The comparison of several trained policies with the reference policy and with each other.

All policies answer the same held-out prompts with the same sampling seeds, so every difference is paired by
prompt; differences of two variants are paired by training seed as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.comparison_results import (
    PairDifference,
    ScorerResult,
    VariantFacts,
    VariantScore,
)
from qrpo_core.evaluation.crossed import CrossedMean, holm
from qrpo_core.evaluation.inputs import Floats


@dataclass(frozen=True)
class Observed:
    """One measure on the held-out prompts: means over a prompt's completions, NaN where there is none.

    before : the reference policy's, (P,). after : the trained policies', (variants, S, P); all NaN for a
        training that failed.
    """

    before: Floats
    after: Floats

    def on(self, prompts: npt.NDArray[np.bool_]) -> Observed:
        """The measure on some prompts. prompts : booleans of shape (P,)."""
        return Observed(self.before[prompts], self.after[..., prompts])

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Whether a training gave any number, (variants, S)."""
        return np.asarray(np.isfinite(self.after).any(axis=-1), dtype=np.bool_)

    def complete(self) -> Observed:
        """The measure on the prompts with a number from every policy that gave any; DataError without one."""
        everywhere = np.isfinite(self.after) | ~self.trained[..., None]
        kept = np.isfinite(self.before) & everywhere.all(axis=(0, 1))
        if not kept.any():
            raise DataError(
                f"none of {self.before.size} held-out prompts has a number from every policy",
                where="comparison",
                remedy="see the statuses of their rewards",
            )
        return self.on(kept)


def compare_scores(scorer: str, seen: Observed, variants: Sequence[str], confidence: float) -> ScorerResult:
    """Gains over the reference policy, ranks, and every difference of two variants, by one scorer.

    A difference is resolved if its p-value, corrected by Holm's method for all pairs of this scorer, is below
    1 - confidence. Its interval is not corrected.
    """
    asked = seen.before.size
    seen = seen.complete()
    trained = seen.trained
    places = [place for place in range(len(variants)) if trained[place].any()]
    gains = {place: CrossedMean.of(seen.after[place, trained[place]] - seen.before) for place in places}
    pairs = _pairs(seen, places, variants, confidence)
    scores: list[VariantScore] = []
    for place in sorted(places, key=lambda place: -gains[place].value):
        name = variants[place]
        better = sum(pair.resolved and pair.better != name for pair in pairs if name in pair.names)
        worse = sum(pair.resolved and pair.better == name for pair in pairs if name in pair.names)
        scores.append(
            VariantScore(
                variant=name,
                mean=float(seen.after[place, trained[place]].mean()),
                gain=gains[place].estimate(confidence),
                rank=1 + sum(each.value > gains[place].value for each in gains.values()),
                best_rank=1 + better,
                worst_rank=len(places) - worse,
            )
        )
    before = CrossedMean.of(seen.before[None, :]).estimate(confidence)
    return ScorerResult(
        scorer, seen.before.size, asked - seen.before.size, before, tuple(scores), tuple(pairs)
    )


def _pairs(
    seen: Observed, places: Sequence[int], variants: Sequence[str], confidence: float
) -> list[PairDifference]:
    found = []
    for one, other in combinations(places, 2):
        both = seen.trained[one] & seen.trained[other]
        if both.any():
            found.append((one, other, CrossedMean.of(seen.after[one, both] - seen.after[other, both])))
    adjusted = holm([mean.p_value for _, _, mean in found])
    return [
        PairDifference(
            first=variants[one],
            second=variants[other],
            difference=mean.estimate(confidence),
            p_value=p_value,
            resolved=p_value < 1 - confidence,
        )
        for (one, other, mean), p_value in zip(found, adjusted, strict=True)
    ]


def variant_facts(
    variant: str,
    place: int,
    measures: Mapping[str, Observed],
    failed: Mapping[int, str],
    confidence: float,
) -> VariantFacts:
    """KL, lengths and cut completions of a variant. measures : `log_ratio`, `tokens` and `cut`.

    failed : the error of each seed whose training or evaluation failed.
    """

    def mean(name: str) -> CrossedMean | None:
        seen = measures[name]
        trained = seen.trained[place]
        return CrossedMean.of(seen.after[place, trained]) if trained.any() else None

    divergence, tokens, cut = mean("log_ratio"), mean("tokens"), mean("cut")
    seeds = int(measures["log_ratio"].trained[place].sum())
    return VariantFacts(
        variant=variant,
        seeds=seeds,
        failed={str(seed): error for seed, error in failed.items()},
        kl=None if divergence is None else divergence.estimate(confidence),
        tokens=None if tokens is None else tokens.estimate(confidence),
        cut=None if cut is None else cut.value,
    )


def length_slope(prompts: Sequence[str], rewards: Floats, tokens: Floats) -> float | None:
    """The reward that a token more brings among completions of one prompt; None without unequal lengths.

    Least squares within prompts, on the reference policy's completions. prompts, rewards, tokens : one a
    completion, NaN for a completion without a reward.
    """
    ok = np.isfinite(rewards)
    _, group = np.unique(np.asarray(prompts)[ok], return_inverse=True)
    if not group.size:
        return None
    sizes = np.bincount(group)

    def centred(numbers: Floats) -> Floats:
        return numbers - (np.bincount(group, weights=numbers) / sizes)[group]

    length, reward = centred(tokens[ok]), centred(rewards[ok])
    spread = float(length @ length)
    return float(length @ reward) / spread if spread > 0 else None
