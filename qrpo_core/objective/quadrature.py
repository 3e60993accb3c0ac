"""The integral of exp(f(t)/beta) over (0, 1) for any non-decreasing f, in log space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, positive_beta

MAX_DEPTH = 64
"""Bisections of one panel; 2^-64 is below the spacing of float64 near 1."""

# Gauss-Kronrod (7, 15) on [-1, 1]: QUADPACK, Piessens et al. 1983, routine qk15.
_HALF_NODES = np.array(
    [
        0.991455371120812639206854697526329,
        0.949107912342758524526189684047851,
        0.864864423359769072789712788640926,
        0.741531185599394439863864773280788,
        0.586087235467691130294144691693142,
        0.405845151377397166906606412076961,
        0.207784955007898467600689403773245,
    ]
)
_HALF_KRONROD = np.array(
    [
        0.022935322010529224963732008058970,
        0.063092092629978553290700663189204,
        0.104790010322250183839876322541518,
        0.140653259715525918745189590510238,
        0.169004726639267902826583426598550,
        0.190350578064785409913256402421014,
        0.204432940075298892414161999234649,
    ]
)
_HALF_GAUSS = np.array(
    [
        0.0,
        0.129484966168869693270611432679082,
        0.0,
        0.279705391489276667901467771423780,
        0.0,
        0.381830050505118944950369775488975,
        0.0,
    ]
)
_NODES = np.concatenate([-_HALF_NODES, [0.0], _HALF_NODES[::-1]])
_KRONROD = np.concatenate([_HALF_KRONROD, [0.209482141084727828012999174891714], _HALF_KRONROD[::-1]])
_GAUSS = np.concatenate([_HALF_GAUSS, [0.417959183673469387755102040816327], _HALF_GAUSS[::-1]])


def quadrature_log_partition(f: Callable[[FloatArray], FloatArray], beta: float | FloatArray) -> FloatArray:
    """log of the integral of exp(f(t)/beta) over (0, 1), for any non-decreasing f (steps allowed).

    Adaptive Gauss-Kronrod (7, 15) with each panel's integral kept as a logarithm, so beta = 1e-5 neither
    overflows nor underflows. First panels end at 1 - beta 2^j, where the mass of a transform with finite
    slope at 1 lies (method.md section 2c), and at multiples of 1/16.

    Parameters
    ----------
    f : vectorised, [0, 1] -> reals; called on one-dimensional arrays. f(0) may be -inf.
    beta : KL strength, > 0, any shape; equal values are integrated once.

    Returns
    -------
    log Z in nats, in the shape of beta, to about 1e-13 + 1e-16 |f|/beta.

    Raises
    ------
    ObjectiveError : beta <= 0, or no convergence.
    """
    betas = positive_beta(beta)
    distinct, inverse = np.unique(betas, return_inverse=True)
    values = np.array([_log_integral(f, one) for one in distinct.tolist()])
    return np.asarray(values[inverse].reshape(betas.shape)[()], dtype=np.float64)


def _log_integral(f: Callable[[FloatArray], FloatArray], beta: float) -> float:
    scales = beta * 2.0 ** np.arange(-12, 40)
    edges = np.unique(np.concatenate([np.linspace(0.0, 1.0, 17), 1.0 - scales[scales < 1.0]]))
    left, right = edges[:-1], edges[1:]
    settled = -np.inf
    error = -np.inf
    for _ in range(MAX_DEPTH):
        log_value, log_error, noise = _panels(f, beta, left, right)
        total = np.logaddexp.reduce(log_value, initial=settled)
        # Rounding of f alone moves exp(f/beta) by 2^-52 |f|/beta: no use asking for less.
        limit = total + np.log(max(1e-15, 4 * noise))
        # A step closer to 1 than float64 can place it is as well known as it can be.
        open_ = (log_error > limit) & (right - left > 4 * np.spacing(right))
        settled = float(np.logaddexp.reduce(log_value[~open_], initial=settled))
        if not open_.any():
            return settled
        error = float(np.logaddexp.reduce(log_error[open_]) - total)
        middle = 0.5 * (left[open_] + right[open_])
        left, right = np.concatenate([left[open_], middle]), np.concatenate([middle, right[open_]])
    if error > np.log(1e-10):
        raise ObjectiveError(
            f"the integral of exp(f/beta) did not converge at beta = {beta}",
            remedy="f must be non-decreasing and finite on (0, 1]",
        )
    return float(np.logaddexp(settled, np.logaddexp.reduce(log_value[open_])))


def _panels(
    f: Callable[[FloatArray], FloatArray], beta: float, left: FloatArray, right: FloatArray
) -> tuple[FloatArray, FloatArray, float]:
    """For each panel: log integral, log error estimate; and the relative rounding noise of the exponents."""
    half = 0.5 * (right - left)
    nodes = (0.5 * (left + right))[:, None] + half[:, None] * _NODES
    exponent = np.asarray(f(np.clip(nodes, 0.0, 1.0).ravel()), dtype=np.float64).reshape(nodes.shape) / beta
    end = np.asarray(f(right), dtype=np.float64) / beta
    top = exponent.max(axis=1)
    shift = np.where(np.isfinite(top), top, 0.0)
    height = np.exp(exponent - shift[:, None])
    with np.errstate(divide="ignore"):  # log 0 = -inf: an empty panel
        kronrod = np.log(half * (height @ _KRONROD)) + shift
        gauss_error = np.log(half * np.abs(height @ (_KRONROD - _GAUSS))) + shift
        # f is non-decreasing, so what a step between the last node and the right end may hide is bounded by
        # f(right).
        hidden = np.where(end - exponent[:, -1] > 0.01, np.log(half * (1.0 - _NODES[-1])) + end, -np.inf)
    noise = float(np.finfo(np.float64).eps * np.abs(exponent[np.isfinite(exponent)]).max(initial=1.0))
    return kronrod, np.maximum(gauss_error, hidden), noise
