"""A fit that rises and then stays level, by least squares."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: A further level of the staircase must lower the squared error by the square of two standard errors.
_PRICE = 4.0


def flat_from(rows: Floats, sums: Floats, squares: Floats) -> tuple[int, Floats]:
    """(the first group of the flat top, fitted mean of every group), by least squares.

    The fit is isotonic regression below the top and constant on it, at whatever height: a judge may fall off
    there. Every level of the staircase costs `_PRICE` times the variance within groups, so that noise makes
    no further step; without a price the last group alone would be the top of nearly every fit. Groups
    without rows are passed over.
    """
    from scipy.optimize import isotonic_regression

    used = np.flatnonzero(rows)
    weights, means = rows[used], sums[used] / rows[used]
    left = float(rows.sum()) - len(used)
    variance = max(0.0, float((squares[used] - weights * means**2).sum())) / left if left > 0 else 0.0
    best, cost = (0, np.zeros(len(used))), math.inf
    for top in range(len(used)):
        fit, levels = np.empty(len(used)), 1
        fit[top:] = np.average(means[top:], weights=weights[top:])
        if top:
            below = isotonic_regression(means[:top], weights=weights[:top])
            fit[:top], levels = below.x, len(below.blocks)
        found = float((weights * (means - fit) ** 2).sum()) + _PRICE * variance * levels
        if found < cost - 1e-12 * (1.0 + rows.sum()):
            best, cost = (top, fit), found
    whole = np.full(len(rows), np.nan)
    whole[used] = best[1]
    return int(used[best[0]]), whole
