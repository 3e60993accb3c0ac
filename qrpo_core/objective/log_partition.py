"""Finite sums of exp(f(R_q)/beta), in nats: the partition functions of n references.

`RewardTransform.log_partition` is the population's (R_q uniform). Sums are returned as (max, rest) with
log Z = max/beta + rest: a target is f - max - beta rest, so where all values are equal rest is exactly 0, and
so is the target (docs/reference/method.md, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, listed, positive_beta
from qrpo_core.objective.transforms import RewardTransform

CHUNK = 1 << 21
"""Numbers in memory at a time (16 MB)."""


def finite_log_partition(transform: RewardTransform, beta: ArrayLike, num_reference: ArrayLike) -> FloatArray:
    """log of the mean over k = 0..n of exp(f(k/n)/beta), in nats.

    Exact for an independent sample without ties: n R_q is then uniform on {0..n} (docs/reference/method.md,
    section 3.1). For a sample that was one of m references and was left out, n = m - 1.

    Parameters
    ----------
    transform : f, clamped at n where it must be (`RewardTransform.apply`).
    beta, num_reference : broadcast against each other; beta > 0, num_reference integer >= 1.

    Raises
    ------
    ObjectiveError : beta <= 0, num_reference < 1 or below the transform's minimum.
    """
    betas, n = np.broadcast_arrays(positive_beta(beta), np.asarray(num_reference))
    if n.dtype.kind not in "iu" or (n < 1).any():
        raise ObjectiveError(f"num_reference must be integers >= 1, got {listed(np.unique(n))}")
    if transform.varies_by_prompt:
        raise ObjectiveError(
            "the transform differs by prompt", remedy="pick one prompt with transform.at(prompt)"
        )
    top, rest = finite_sums(transform, betas.ravel(), n.ravel().astype(np.int64))
    return np.asarray((top / betas.ravel() + rest).reshape(betas.shape)[()], dtype=np.float64)


def finite_sums(
    transform: RewardTransform,
    beta: FloatArray,
    num_reference: NDArray[np.int64],
    prompt: NDArray[np.int64] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`finite_log_partition` of each row as (max, rest).

    All columns of equal length; prompt is needed where the transform varies by prompt.
    """
    top, rest = np.empty_like(beta), np.empty_like(beta)
    for n in np.unique(num_reference).tolist():
        rows = np.flatnonzero(num_reference == n)
        grid = np.arange(n + 1) / n
        for part in np.array_split(rows, -(-len(rows) * (n + 1) // CHUNK)):
            here = transform if prompt is None else transform.at(prompt[part][:, None])
            values = np.broadcast_to(here.apply(grid[None, :], n), (len(part), n + 1))
            top[part] = values.max(axis=1)
            scaled = (values - top[part, None]) / beta[part, None]
            # expm1 and log1p: at beta = 1e3 log Z is 5e-4, and exp would round it to 13 digits.
            rest[part] = np.log1p(np.expm1(scaled).mean(axis=1))
    return top, rest


def segment_sums(
    values: FloatArray, offsets: NDArray[np.int64], segment: NDArray[np.int64], beta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """log mean exp(v/beta[i]) over v = values[offsets[s] : offsets[s + 1]], s = segment[i], as (max, rest).

    -inf counts as exp(-inf) = 0. +inf is refused: either f was applied without its clamp, or exp(f/beta) has
    no finite mean.
    """
    if not (values < np.inf).all():
        raise ObjectiveError(
            "the transform is infinite at the quantile of a reference",
            remedy="pass num_references, so that it is clamped",
        )
    top, rest = np.empty(len(segment)), np.empty(len(segment))
    for rows, index, first, size in segment_chunks(offsets, segment):
        part = values[index]
        most = np.maximum.reduceat(part, first)
        top[rows] = np.where(np.isneginf(most), 0.0, most)
        scaled = (part - np.repeat(top[rows], size)) / np.repeat(beta[rows], size)
        with np.errstate(divide="ignore"):  # all are -inf
            rest[rows] = np.log1p(np.add.reduceat(np.expm1(scaled), first) / size)
    return top, rest


def segment_chunks(
    offsets: NDArray[np.int64], segment: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Chunks of rows that each stand for a segment s of a table, rows offsets[s] : offsets[s + 1].

    Yields (rows of `segment`, the table's rows of all their segments, where each segment begins among
    those, the size of each segment).
    """
    count = np.diff(offsets)[segment]
    ends = np.cumsum(count)
    start = 0
    while start < len(segment):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        rows = slice(start, stop)
        size, first = count[rows], ends[rows] - count[rows] - done
        yield rows, np.arange(int(size.sum())) + np.repeat(offsets[segment[rows]] - first, size), first, size
        start = stop
