"""Checks of arguments: finite rewards, integer codes, equal lengths, beta > 0, quantiles in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_SHOWN = 5


def listed(values: Sequence[object] | NDArray[np.generic]) -> str:
    """The first five values as text, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    more = len(values) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def row_names(rows: NDArray[np.int64], ids: Sequence[str] | None) -> list[str]:
    """Rows as a message names them, with their ids where these are given."""
    return [f"row {row}" if ids is None else f"row {row} = {ids[row]}" for row in rows.tolist()]


def finite_rewards(
    rewards: ArrayLike, *, what: str = "rewards", ids: Sequence[str] | None = None
) -> FloatArray:
    """Rewards as a float64 vector; raises ObjectiveError with the rows (and ids) of NaN or infinite ones.

    A comparison with NaN is quietly False, so one NaN would become the quantile 0 (docs/reference/method.md,
    section 8).
    """
    array = np.asarray(rewards, dtype=np.float64)
    if array.ndim != 1:
        raise ObjectiveError(f"{what} must be one-dimensional, got shape {array.shape}")
    if ids is not None and len(ids) != len(array):
        raise ObjectiveError(
            f"{what} has {len(array)} rows and ids has {len(ids)}", remedy="give one id for each row"
        )
    rows = np.flatnonzero(~np.isfinite(array))
    if len(rows):
        names = row_names(rows, ids)
        raise ObjectiveError(
            f"{len(rows)} of {len(array)} {what} are NaN or infinite",
            where=listed([f"{name}: {value}" for name, value in zip(names, array[rows], strict=True)]),
            remedy="annotate these rows again, or leave them out by their status before ranking",
        )
    return array


def integers(values: ArrayLike, *, what: str) -> IntArray:
    """A one-dimensional int64 array; a float column is refused rather than truncated."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ObjectiveError(
            f"{what} must be a one-dimensional integer array, got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64, copy=False)


def same_length(**arrays: NDArray[np.generic] | None) -> int:
    """The common length of the arrays that are not None; unequal lengths are refused."""
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ObjectiveError(f"arrays of unequal length: {found}", remedy="pass columns of one table")
    return next(iter(lengths.values()))


def positive_beta(beta: ArrayLike) -> FloatArray:
    """KL strength as float64 (any shape); refused unless finite and > 0."""
    array = np.asarray(beta, dtype=np.float64)
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        raise ObjectiveError(
            f"beta must be finite and > 0, got {listed(array[bad].ravel())}",
            remedy="published settings lie between 3e-4 and 0.1 (docs/reference/method.md, section 7)",
        )
    return array


def quantiles_in_range(quantiles: ArrayLike) -> FloatArray:
    """Quantiles as float64 (any shape); refused unless all lie in [0, 1]."""
    array = np.asarray(quantiles, dtype=np.float64)
    bad = ~((array >= 0) & (array <= 1))
    if bad.any():
        raise ObjectiveError(f"quantiles must lie in [0, 1], got {listed(array[bad].ravel())}")
    return array
