"""Rank counts and quantile rewards: a completion's rank among reference completions.

Source: docs/reference/method.md, sections 1 and 3. The quantile reward of the QRPO paper is R_q = P_ref(R' <=
R), estimated from n reference completions. The store keeps three integers for each sample, below, equal and
n; quantiles, intervals and targets derive from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import (
    FloatArray,
    IntArray,
    finite_rewards,
    integers,
    listed,
    row_names,
    same_length,
)
from qrpo_core.objective.references import equal_blocks, group_by_prompt, sort_references

TieMethod = Literal["weak", "mid", "strict", "randomized"]
TIE_METHODS: tuple[TieMethod, ...] = get_args(TieMethod)


@dataclass(frozen=True, eq=False)
class RankCounts:
    """Ranks of samples among their references: int64 columns of equal length.

    below : references with a smaller reward. equal : references with the same reward; the sample itself
    does not count. n : references compared with, >= 1.
    """

    below: IntArray
    equal: IntArray
    n: IntArray

    def __post_init__(self) -> None:
        for name in ("below", "equal", "n"):
            object.__setattr__(self, name, integers(getattr(self, name), what=name))
        same_length(below=self.below, equal=self.equal, n=self.n)
        bad = (self.n < 1) | (self.below < 0) | (self.equal < 0) | (self.below + self.equal > self.n)
        if bad.any():
            raise ObjectiveError(
                "rank counts need n >= 1, below >= 0, equal >= 0 and below + equal <= n",
                where=f"rows {listed(np.flatnonzero(bad))}",
            )

    def __len__(self) -> int:
        return len(self.n)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> RankCounts:
        """The counts of some rows, by index or mask."""
        return RankCounts(self.below[rows], self.equal[rows], self.n[rows])


def rank_counts(
    rewards: ArrayLike, reference_rewards: ArrayLike, in_pool: bool, *, ids: Sequence[str] | None = None
) -> RankCounts:
    """Rank counts of samples of one prompt.

    Parameters
    ----------
    rewards : [samples].
    reference_rewards : [references].
    in_pool : whether each sample is itself one of the references. It is then left out of them, so equal and n
        are one less. That removes the bias E[estimate] = R_q + (1 - R_q)/n of a sample inside its own
        references (docs/reference/method.md, section 3.2), except for a sample selected by its rank: take
        references from outside the selection pool there.
    ids : names of the samples, for messages.

    Raises
    ------
    ObjectiveError : NaN or infinite rewards; no reference left; in_pool and a reward that no reference has.
    """
    values = finite_rewards(rewards, ids=ids)
    references = finite_rewards(reference_rewards, what="reference rewards")
    zeros = np.zeros(len(values), dtype=np.int64)
    return rank_counts_table(zeros, values, np.zeros(len(references), np.int64), references, in_pool, ids=ids)


def rank_counts_table(
    sample_prompt: ArrayLike,
    sample_rewards: ArrayLike,
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    in_pool: bool | NDArray[np.bool_],
    *,
    ids: Sequence[str] | None = None,
) -> RankCounts:
    """Rank counts of a whole table of samples against a ragged table of references.

    Parameters
    ----------
    sample_prompt, sample_rewards : [samples]; integer prompt codes (any order, gaps allowed) and rewards.
    reference_prompt, reference_rewards : [references]; any order, any number for each prompt.
    in_pool : as in `rank_counts`; one bool for all samples, or [samples].
    ids : [samples] names, for messages.

    Returns
    -------
    RankCounts aligned with the samples.

    Raises
    ------
    ObjectiveError : NaN or infinite rewards (rows and ids named); a prompt whose n becomes 0 (codes named);
        in_pool and a reward that no reference has; unequal lengths.
    """
    prompt = integers(sample_prompt, what="sample prompt codes")
    rewards = finite_rewards(sample_rewards, ids=ids)
    same_length(sample_prompt=prompt, sample_rewards=rewards)
    pooled = np.asarray(in_pool, dtype=bool)
    if pooled.ndim and pooled.shape != rewards.shape:
        raise ObjectiveError(f"in_pool has shape {pooled.shape}, samples have {rewards.shape}")
    if len(rewards) == 0:
        return RankCounts(prompt, prompt, prompt)
    if np.size(reference_rewards) == 0:
        raise _no_reference(prompt)
    references = sort_references(reference_prompt, reference_rewards)
    where = references.groups.position(prompt)
    if (where < 0).any():
        raise _no_reference(prompt[where < 0])
    below, equal = references.count(where, rewards)
    _check_in_pool(pooled & (equal == 0), ids)
    n = references.groups.counts[where] - pooled
    if (n == 0).any():
        raise _no_reference(prompt[n == 0])
    return RankCounts(below, equal - pooled, n)


def leave_one_out_counts(reference_prompt: ArrayLike, reference_rewards: ArrayLike) -> RankCounts:
    """Rank counts of every reference among the others of its prompt, aligned with the references.

    Equals `rank_counts_table(p, r, p, r, in_pool=True)`, by counting runs of equal rewards.

    Raises
    ------
    ObjectiveError : as `rank_counts_table`; a prompt with one reference has no leave-one-out and is named.
    """
    rewards = finite_rewards(reference_rewards, what="reference rewards")
    groups = group_by_prompt(reference_prompt)
    same_length(reference_prompt=np.asarray(reference_prompt), reference_rewards=rewards)
    if (groups.counts < 2).any():
        raise _no_reference(groups.codes[groups.counts < 2])
    grouped = groups.gather(rewards)
    below, equal = np.empty((2, len(rewards)), dtype=np.int64)
    for block in equal_blocks(groups):
        rows = block if groups.order is None else groups.order[block]
        by_rank = np.argsort(grouped[block], axis=1)
        first, last = _run_ends(np.take_along_axis(grouped[block], by_rank, axis=1))
        rows = np.take_along_axis(rows, by_rank, axis=1)
        below[rows], equal[rows] = first, last - first
    n = np.empty(len(rewards), dtype=np.int64)
    n[slice(None) if groups.order is None else groups.order] = np.repeat(groups.counts - 1, groups.counts)
    return RankCounts(below, equal, n)


def _run_ends(ascending: FloatArray) -> tuple[IntArray, IntArray]:
    """For each entry of ascending rows, the columns where the run of values equal to it begins and ends."""
    columns = np.broadcast_to(np.arange(ascending.shape[1]), ascending.shape)
    changes = ascending[:, 1:] != ascending[:, :-1]
    first, last = np.zeros_like(columns), np.full_like(columns, ascending.shape[1] - 1)
    first[:, 1:] = np.where(changes, columns[:, 1:], 0)
    last[:, :-1] = np.where(changes, columns[:, :-1], last[:, :-1])
    return np.maximum.accumulate(first, axis=1), np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]


def tie_rate(reference_prompt: ArrayLike, reference_rewards: ArrayLike) -> float:
    """Share of the references whose reward another reference of the same prompt has too."""
    return float(sort_references(reference_prompt, reference_rewards).tied().mean())


def quantile(
    below: ArrayLike,
    equal: ArrayLike,
    n: ArrayLike,
    tie_method: TieMethod,
    seeds: NDArray[np.uint64] | None = None,
) -> FloatArray:
    """The quantile reward, in [0, 1], from rank counts.

    weak (below + equal)/n, the paper's; mid (below + equal/2)/n; strict below/n; randomized (below + U
    equal)/n with U in (0, 1) a function of the sample's seed. Without ties all four agree. With
    ties each has its own partition function (docs/reference/method.md, section 3.3).

    Parameters
    ----------
    below, equal, n : [samples] integers.
    seeds : [samples] uint64, from the ids of the samples; for "randomized" only.

    Raises
    ------
    ObjectiveError : unknown tie method, randomized without seeds, impossible counts.
    """
    counts = RankCounts(*(np.atleast_1d(np.asarray(column)) for column in (below, equal, n)))
    if tie_method == "weak":
        return (counts.below + counts.equal) / counts.n
    if tie_method == "mid":
        return (counts.below + 0.5 * counts.equal) / counts.n
    if tie_method == "strict":
        return counts.below / counts.n
    if tie_method == "randomized":
        return (counts.below + _uniforms(seeds, len(counts)) * counts.equal) / counts.n
    raise ObjectiveError(f"unknown tie method {tie_method!r}", remedy=f"one of {', '.join(TIE_METHODS)}")


def exchangeable_quantile(counts: RankCounts, seeds: NDArray[np.uint64]) -> FloatArray:
    """(below + U (equal + 1))/(n + 1): exactly uniform on (0, 1) if sample and references are exchangeable.

    This holds at every n and with ties, so the grid k/n does not mislead a test of uniformity. For
    diagnostics, not for targets: it is not the quantile of any tie method.
    """
    return (counts.below + _uniforms(seeds, len(counts)) * (counts.equal + 1)) / (counts.n + 1)


def quantile_interval(
    below: ArrayLike, equal: ArrayLike, n: ArrayLike, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Exact (Clopper-Pearson) confidence interval of R_q = P_ref(R' <= R) from below + equal hits in n draws.

    Returns
    -------
    (lower, upper), each [samples]; it covers R_q with probability at least `level`, whatever R_q is.

    Raises
    ------
    ObjectiveError : level outside (0, 1), impossible counts.
    """
    from scipy.special import betaincinv

    if not 0.0 < level < 1.0:
        raise ObjectiveError(f"level must lie between 0 and 1, got {level}")
    counts = RankCounts(*(np.atleast_1d(np.asarray(column)) for column in (below, equal, n)))
    hits, misses = counts.below + counts.equal, counts.n - counts.below - counts.equal
    tail = 0.5 * (1.0 - level)
    lower = np.where(hits == 0, 0.0, betaincinv(np.maximum(hits, 1), misses + 1, tail))
    upper = np.where(misses == 0, 1.0, betaincinv(hits + 1, np.maximum(misses, 1), 1.0 - tail))
    return lower, upper


def _uniforms(seeds: NDArray[np.uint64] | None, rows: int) -> FloatArray:
    if seeds is None:
        raise ObjectiveError(
            "the randomized tie method needs a seed for each sample",
            remedy="derive uint64 seeds from the sample ids",
        )
    array = np.atleast_1d(np.asarray(seeds))
    if array.dtype.kind not in "iu" or array.shape != (rows,):
        raise ObjectiveError(f"seeds must be {rows} integers, got {array.dtype} of shape {array.shape}")
    return uniform_from_seed(array.astype(np.uint64))


def uniform_from_seed(seeds: NDArray[np.uint64]) -> FloatArray:
    """A number in the open interval (0, 1) for each 64-bit seed, by the finaliser of splitmix64.

    Equal seeds give equal numbers on every machine, without the state of a generator.
    """
    mixed = np.atleast_1d(np.asarray(seeds)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # 52 bits and a half step: neither 0 nor 1 can come out.
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _no_reference(codes: IntArray) -> ObjectiveError:
    distinct = np.unique(codes)
    return ObjectiveError(
        f"{len(distinct)} prompts have no reference to compare with (n = 0)",
        where=f"prompt codes {listed(distinct)}",
        remedy="draw references for them; the only reference of a prompt cannot be ranked: leaving it out "
        "leaves none, and counting it gives the quantile 1 whatever its reward",
    )


def _check_in_pool(missing: NDArray[np.bool_], ids: Sequence[str] | None) -> None:
    rows = np.flatnonzero(missing)
    if len(rows):
        raise ObjectiveError(
            f"in_pool says that {len(rows)} samples are references, but no reference has their reward",
            where=listed(row_names(rows, ids)),
            remedy="pass in_pool = False for samples that are not references",
        )
