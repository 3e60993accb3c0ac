"""Partition functions: the mean of exp(f(R_q)/beta) under the reference policy, for the R_q in use.

`RewardTransform.log_partition` is the population's (R_q uniform). Here: with n references and no ties
(`finite_log_partition`, method.md section 3.1), for the quantiles that a prompt's references really have
(`empirical_log_partition`, 3.4) and for small beta (`laplace_log_partition`, 2c). All give log Z in nats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, listed, positive_beta, quantiles_in_range
from qrpo_core.objective.quadrature import quadrature_log_partition
from qrpo_core.objective.special import log_mean_exp
from qrpo_core.objective.transform_base import RewardTransform

__all__ = [
    "empirical_log_partition",
    "finite_log_partition",
    "finite_parts",
    "laplace_log_partition",
    "quadrature_log_partition",
    "segment_parts",
]

CHUNK = 1 << 21
"""Numbers held at a time by the ragged and finite sums (16 MB)."""


def finite_log_partition(transform: RewardTransform, beta: ArrayLike, num_reference: ArrayLike) -> FloatArray:
    """log of the mean over k = 0..n of exp(f(k/n)/beta): exact for an independent sample without ties.

    n R_q is then uniform on {0..n} (method.md section 3.1). For a sample that was one of m references and was
    left out, n = m - 1.

    Parameters
    ----------
    transform : f, clamped at n where it must be (`RewardTransform.apply`).
    beta, num_reference : broadcast against each other; beta > 0, num_reference integer >= 1.

    Returns
    -------
    log Z_n in nats, in the broadcast shape.

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
    top, rest = finite_parts(transform, betas.ravel(), n.ravel().astype(np.int64))
    return np.asarray((top / betas.ravel() + rest).reshape(betas.shape)[()], dtype=np.float64)


def finite_parts(
    transform: RewardTransform,
    beta: FloatArray,
    num_reference: NDArray[np.int64],
    prompt: NDArray[np.int64] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Rows of `finite_log_partition` as (max, rest): log Z = max/beta + rest, beta log Z = max + beta rest.

    All columns of equal length; prompt is needed where the transform varies by prompt.
    """
    top, rest = np.empty_like(beta), np.empty_like(beta)
    for n in np.unique(num_reference).tolist():
        rows = np.flatnonzero(num_reference == n)
        grid = np.arange(n + 1) / n
        for part in np.array_split(rows, -(-len(rows) * (n + 1) // CHUNK)):
            here = transform if prompt is None else transform.at(prompt[part][:, None])
            values = np.broadcast_to(here.apply(grid[None, :], n), (len(part), n + 1))
            top[part], rest[part] = log_mean_exp(values, beta[part])
    return top, rest


def empirical_log_partition(
    quantiles: ArrayLike,
    beta: ArrayLike,
    transform: RewardTransform,
    mask: ArrayLike | None = None,
    num_references: ArrayLike | None = None,
) -> FloatArray:
    """log of the mean of exp(f(R_q)/beta) over a prompt's references: right with ties (method.md 3.4).

    Parameters
    ----------
    quantiles : [prompts, references], the references' own quantiles, best leave-one-out among themselves,
        under the convention that the samples have.
    beta : a number or [prompts].
    transform : f.
    mask : [prompts, references] bool, False where a ragged prompt is padded; nothing is read there.
    num_references : n behind the quantiles (number or [prompts]); needed where f is infinite at 0 or 1.

    Returns
    -------
    [prompts] log Z in nats.

    Raises
    ------
    ObjectiveError : shapes that do not fit, a prompt without references, quantiles not in [0, 1], infinite f.
    """
    values = np.asarray(quantiles, dtype=np.float64)
    if values.ndim != 2:
        raise ObjectiveError(f"quantiles must be [prompts, references], got shape {values.shape}")
    kept = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if kept.shape != values.shape:
        raise ObjectiveError(f"mask has shape {kept.shape}, quantiles have {values.shape}")
    counts = kept.sum(axis=1)
    if (counts == 0).any():
        raise ObjectiveError(
            "prompts without references", where=f"rows {listed(np.flatnonzero(counts == 0))}"
        )
    betas = np.broadcast_to(positive_beta(beta), counts.shape)
    n = None
    if num_references is not None:
        n = np.broadcast_to(np.asarray(num_references), counts.shape)[:, None].repeat(
            values.shape[1], axis=1
        )[kept]
    transformed = transform.apply(quantiles_in_range(values[kept]), n)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    top, rest = segment_parts(transformed, offsets, np.arange(len(counts)), betas)
    return top / betas + rest


def segment_parts(
    values: FloatArray, offsets: NDArray[np.int64], segment: NDArray[np.int64], beta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """log mean exp(v/beta[i]) over v = values[offsets[s] : offsets[s + 1]], s = segment[i], as (max, rest).

    The ragged form of `log_mean_exp`, a block of rows at a time. An infinite value is refused: exp(f/beta)
    then has no finite mean (or, at -inf, f was applied without its clamp).
    """
    if not np.isfinite(values).all():
        raise ObjectiveError(
            "the transform is infinite at the quantile of a reference",
            remedy="pass num_references, so that it is clamped",
        )
    count = np.diff(offsets)[segment]
    top, rest = np.empty(len(segment)), np.empty(len(segment))
    ends = np.cumsum(count)
    start = 0
    while start < len(segment):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        rows = slice(start, stop)
        size, first = count[rows], ends[rows] - count[rows] - done
        index = np.arange(int(size.sum())) + np.repeat(offsets[segment[rows]] - first, size)
        held = values[index]
        top[rows] = np.maximum.reduceat(held, first)
        scaled = (held - np.repeat(top[rows], size)) / np.repeat(beta[rows], size)
        # Values equal to the largest give exactly 0 here, so a prompt with one reward has rest = 0 exactly.
        rest[rows] = np.log1p(np.add.reduceat(np.expm1(scaled), first) / size)
        start = stop
    return top, rest


def laplace_log_partition(transform: RewardTransform, beta: ArrayLike, order: int = 2) -> FloatArray:
    """Laplace's method at the end point t = 1, for small beta (method.md section 2c).

        beta log Z = f(1) + beta log(beta/f'(1)) + beta^2 f''(1)/f'(1)^2 + O(beta^3)

    `order` is the highest power of beta kept, 1 or 2. It shows that a transform with a finite slope at 1 only
    rescales beta (beta/f'(1)); `log_partition` is what to compute with.

    Range: beta <= 0.1 f'(1)^2/max(f'(1), |f''(1)|), where the error in log Z is below 0.05 nats at order 2
    and falls as beta^order. What it leaves out at t = 0 is of order exp((f(0) - f(1))/beta).

    Raises
    ------
    ObjectiveError : beta <= 0, order not 1 or 2, or a transform without a finite positive slope at 1 (normal,
        scaled_normal, custom).
    """
    betas = positive_beta(beta)
    if order not in (1, 2):
        raise ObjectiveError(f"order must be 1 or 2, got {order}")
    slope = transform.slope_at_one
    if slope is None:
        raise ObjectiveError(
            f"transform {transform.name!r} has no known finite slope at 1",
            remedy="use transform.log_partition(beta)",
        )
    first, second = slope
    log_z = transform.bounds[1] / betas + np.log(betas / first)
    if order == 2:
        log_z = log_z + betas * second / first**2
    return np.asarray(log_z[()], dtype=np.float64)
