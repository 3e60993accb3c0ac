"""How far up the quantiles of a reward a second judge agrees with it.

Both are seen through ranks within prompts alone, so nothing here changes under an increasing map of either.
Every interval is a percentile bootstrap over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.results import Estimate
from qrpo_core.evaluation.staircase import flat_from
from qrpo_core.objective.quantiles import leave_one_out_counts, quantile

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RESAMPLES = 1000
#: Most groups of quantiles.
_GROUPS = 20


@dataclass(frozen=True)
class QuantileGroup:
    """The judged completions whose reward's quantile is in (low, high].

    judge : the judge's mean quantile among the judged completions of the same prompt; 0.5 if it is blind.
    fitted : the same by the staircase of `stops_rising`.
    agreement : share of the pairs with both completions in this group or above on which the judge prefers the
        one that the reward prefers, its ties one half; None without such pairs.
    """

    low: float
    high: float
    rows: int
    judge: Estimate
    fitted: float
    pairs: int
    agreement: Estimate | None


@dataclass(frozen=True)
class JudgeAgreement:
    """A judge beside the reward, on the same completions.

    agreement : share of all pairs within prompts with unequal rewards on which the judge prefers the one that
        the reward prefers, its ties one half. ties : share of these pairs to which the judge gives one score.
    correlation : rank correlation of both within prompts. beyond_length : the same at equal length (partial
        rank correlation); None where one of the three is constant.
    length : rank correlation of the judge with length within prompts; None where it is constant.
    stops_rising : the quantile from which the judge's mean quantile does not rise further; 1: it rises to the
        top. See `staircase.flat_from`.
    rise_above : slope of the judge's mean quantile above that place over its slope below it; None where
        either has fewer than two groups. Few rows show no rise where there is one: see `parts`.
    """

    prompts: int
    rows: int
    pairs: int
    agreement: Estimate
    ties: float
    correlation: Estimate | None
    beyond_length: Estimate | None
    length: Estimate | None
    stops_rising: Estimate
    rise_above: Estimate | None
    groups: tuple[QuantileGroup, ...]

    @property
    def follows(self) -> bool:
        """Whether the judge agrees with the reward beyond chance at all."""
        return (self.agreement.value if self.agreement.low is None else self.agreement.low) > 0.5

    @property
    def parts(self) -> bool:
        """Whether the data rule out that the judge rises above the place at half its slope below it."""
        rise = self.rise_above
        return self.follows and rise is not None and rise.high is not None and rise.high < 0.5

    @property
    def contradicts(self) -> bool:
        """Whether the judge prefers the opposite beyond chance."""
        return (self.agreement.value if self.agreement.high is None else self.agreement.high) < 0.5


def judge_agreement(
    prompt: npt.ArrayLike,
    rewards: npt.ArrayLike,
    position: npt.ArrayLike,
    scores: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    references: int,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> JudgeAgreement:
    """Compare a judge with the reward.

    Parameters
    ----------
    prompt, rewards, scores, lengths : [rows] prompt codes, rewards, the judge's scores, tokens.
    position : [rows] quantile of each reward among all references of its prompt, in (0, 1), mid-ranks:
        (below + (equal + 1)/2)/(n + 1) with the counts of the others.
    references : n + 1, of a typical prompt. It bounds the groups and says how exact a position is.

    Raises
    ------
    DataError : no prompt has two completions with unequal rewards.
    """
    code, kept = _with_others(prompt)
    reward, place, score, length = (
        np.asarray(column, np.float64)[kept] for column in (rewards, position, scores, lengths)
    )
    number = max(1, min(_GROUPS, references))
    group = np.minimum((place * number).astype(np.int64), number - 1)
    pairs = _pairs(code, reward, score, group, number)
    if not pairs[:, 0].sum():
        raise DataError(
            "no prompt has two judged completions with unequal rewards",
            where="pool report",
            remedy="raise pool_report.prompts or pool_report.completions_per_prompt",
        )
    ranked, judged, long = (mid_rank(code, column) for column in (reward, score, length))
    levels = _levels(code, judged, group, number)
    moments = [_moments(code, *both) for both in ((ranked, judged), (ranked, long), (judged, long))]
    table = np.concatenate([pairs.reshape(len(pairs), -1), levels.reshape(len(pairs), -1), *moments], axis=1)
    sums, drawn = table.sum(axis=0), _resampled(table, seed, resamples)
    tail = _Tail(number, sums, drawn, confidence)
    fitted = tail.fitted()
    return JudgeAgreement(
        prompts=len(table),
        rows=code.size,
        pairs=int(sums[:number].sum()),
        agreement=tail.agreement(0) or Estimate(0.5, None, None),
        ties=float(sums[2 * number : 3 * number].sum() / sums[:number].sum()),
        correlation=tail.estimate(lambda row: _correlation(row[-9:-6])),
        beyond_length=tail.estimate(_partial_correlation),
        length=tail.estimate(lambda row: _correlation(row[-3:])),
        stops_rising=tail.stops_rising(references),
        rise_above=tail.rise_above(),
        groups=tuple(tail.group(at, fitted) for at in range(number) if sums[3 * number + at]),
    )


def rank_correlation(
    prompt: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Correlation of two columns' mid-ranks within prompts, [rows] each; None where one is constant.

    Prompts with one row do not count.
    """
    code, kept = _with_others(prompt)
    if not code.size:
        return None
    a, b = (mid_rank(code, np.asarray(column, np.float64)[kept]) for column in (first, second))
    table = _moments(code, a, b)
    found = _Tail(0, table.sum(axis=0), _resampled(table, seed, resamples), confidence)
    return found.estimate(_correlation)


def _with_others(prompt: npt.ArrayLike) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """(codes 0, 1, ... of the kept rows, which rows are kept): those whose prompt has another row."""
    _, code, sizes = np.unique(np.asarray(prompt), return_inverse=True, return_counts=True)
    kept = sizes[code] > 1
    return np.unique(code[kept], return_inverse=True)[1].astype(np.int64), kept


def mid_rank(code: Integers, values: Floats) -> Floats:
    """The quantile of each value among the others of its prompt, ties one half, [rows]."""
    counts = leave_one_out_counts(code, values)
    return quantile(counts.below, counts.equal, counts.n, "mid")


def _pairs(code: Integers, rewards: Floats, scores: Floats, group: Integers, number: int) -> Floats:
    """[prompts, 3, groups]: pairs by the lower group of the two: their number, agreements, judge's ties."""
    order = np.argsort(code, kind="stable")
    found = np.zeros((int(code.max(initial=-1)) + 1, 3, number))
    if not code.size:
        return found
    for at, rows in enumerate(np.split(order, np.flatnonzero(np.diff(code[order])) + 1)):
        higher = rewards[rows][:, None] > rewards[rows][None, :]
        better = np.sign(scores[rows][:, None] - scores[rows][None, :])[higher]
        lower = np.minimum(group[rows][:, None], group[rows][None, :])[higher]
        for place, weight in enumerate((None, 0.5 * (1 + better), (better == 0).astype(float))):
            found[at, place] = np.bincount(lower, weight, minlength=number)
    return found


def _levels(code: Integers, judged: Floats, group: Integers, number: int) -> Floats:
    """[prompts, 3, groups]: rows, sum and sum of squares of the judge's quantile."""
    found = np.zeros((int(code.max()) + 1, 3, number))
    for place, weight in enumerate((np.ones_like(judged), judged, judged**2)):
        np.add.at(found[:, place], (code, group), weight)
    return found


def _moments(code: Integers, first: Floats, second: Floats) -> Floats:
    """[prompts, 3]: products and squares of two columns of mid-ranks about their mean in a prompt, 0.5."""
    a, b = first - 0.5, second - 0.5
    return np.stack([np.bincount(code, weight) for weight in (a * b, a * a, b * b)], axis=1)


def _correlation(moments: Floats) -> float:
    product, one, two = moments.tolist()
    return product / math.sqrt(one * two) if one > 0 and two > 0 else math.nan


def _partial_correlation(row: Floats) -> float:
    """The first of three correlations with the part taken out that both columns have with the third."""
    both, one, other = (_correlation(part) for part in np.split(row[-9:], 3))
    left = (1 - one**2) * (1 - other**2)
    return (both - one * other) / math.sqrt(left) if left > 1e-12 else math.nan


def _resampled(table: Floats, seed: int, resamples: int) -> Floats:
    """[resamples, columns]: sums over as many prompts, drawn with replacement. table : [prompts, columns]."""
    generator, prompts = np.random.default_rng(seed), len(table)
    if prompts < 2:
        return table[:0]
    draws = (generator.integers(prompts, size=prompts) for _ in range(resamples))
    return np.stack([np.bincount(each, minlength=prompts) @ table for each in draws])


class _Tail:
    """Estimates from the sums of a table, and of its resamples."""

    def __init__(self, groups: int, sums: Floats, drawn: Floats, confidence: float) -> None:
        self.groups, self.sums, self.drawn, self.confidence = groups, sums, drawn, confidence

    def estimate(self, of: Callable[[Floats], float]) -> Estimate | None:
        """A function of the sums with its interval; None where it has no value."""
        value = of(self.sums)
        found = np.array([of(row) for row in self.drawn])
        found = found[np.isfinite(found)]
        if not math.isfinite(value):
            return None
        if not found.size:
            return Estimate(value, None, None)
        low, high = np.quantile(found, [0.5 - self.confidence / 2, 0.5 + self.confidence / 2]).tolist()
        return Estimate(value, low, high)

    def ratio(self, top: Any, bottom: Any) -> Estimate | None:
        """Sum of some columns over the sum of others."""

        def share(row: Floats) -> float:
            return float(row[top].sum() / row[bottom].sum()) if row[bottom].sum() else math.nan

        return self.estimate(share)

    def agreement(self, first: int) -> Estimate | None:
        """Agreement of the pairs with both completions in group `first` or above."""
        return self.ratio(slice(self.groups + first, 2 * self.groups), slice(first, self.groups))

    def _staircase(self, row: Floats) -> tuple[int, Floats]:
        return flat_from(*row[3 * self.groups : 6 * self.groups].reshape(3, self.groups))

    def fitted(self) -> Floats:
        """The fitted mean of every group."""
        return self._staircase(self.sums)[1]

    def stops_rising(self, references: int) -> Estimate:
        """The lower edge of the flat top, 1 where only the last group is in it.

        A reward's rank among few references has an error, which carries worse completions above the place:
        the lower end is lower by two standard errors of a quantile there.
        """

        def place(row: Floats) -> float:
            rows, (first, _) = row[3 * self.groups : 4 * self.groups], self._staircase(row)
            return 1.0 if not rows[first + 1 :].any() and rows[:first].any() else first / self.groups

        found = self.estimate(place)
        assert found is not None  # a place is always a number
        if found.low is None:
            return found
        error = math.sqrt(found.low * (1 - found.low) / references)
        return Estimate(found.value, max(0.0, found.low - 2 * error), found.high)

    def rise_above(self) -> Estimate | None:
        """See `JudgeAgreement`; the place is that of the whole sample in every resample."""
        first = self._staircase(self.sums)[0]
        middles = np.arange(self.groups) / self.groups

        def slope(row: Floats, part: slice) -> float:
            rows, judged = row[3 * self.groups : 5 * self.groups].reshape(2, -1)[:, part]
            x = middles[part] - np.average(middles[part], weights=rows) if rows.sum() else middles[part]
            spread = (rows * x**2).sum()
            return float((x * judged).sum() / spread) if spread > 0 else math.nan

        def ratio(row: Floats) -> float:
            below = slope(row, slice(0, first))
            return slope(row, slice(first, None)) / below if below > 0 else math.nan

        return self.estimate(ratio)

    def group(self, at: int, fitted: Floats) -> QuantileGroup:
        """Group `at` with its estimates."""
        rows = 3 * self.groups + at
        judge = self.ratio(slice(rows + self.groups, rows + self.groups + 1), slice(rows, rows + 1))
        assert judge is not None  # the group has rows
        return QuantileGroup(
            low=at / self.groups,
            high=(at + 1) / self.groups,
            rows=int(self.sums[rows]),
            judge=judge,
            fitted=float(fitted[at]),
            pairs=int(self.sums[at : self.groups].sum()),
            agreement=self.agreement(at),
        )
