"""The integral of exp(f(t)/beta) over (0, 1) for any non-decreasing f, in log space.

scipy.integrate.quad estimates its error at its nodes, so it misses a step of f beside the end of a panel.
Here f is known to be non-decreasing, which bounds the integral between the last node and that end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, positive_beta

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)  # on [-1, 1]
_DEPTH = 64  # bisections of one panel; 2^-64 is below the spacing of float64 near 1
_PRECISION = 1e-15


def quadrature_log_partition(f: Callable[[FloatArray], FloatArray], beta: float | FloatArray) -> FloatArray:
    """log Z(beta) in nats for any non-decreasing f, in the shape of beta; steps of f are allowed.

    Adaptive Gauss-Legendre quadrature with a logarithm for each panel, so that beta = 1e-5 neither overflows
    nor underflows. The first panels end at 1 - 2^-k: they resolve every scale near t = 1, where the
    mass lies for small beta (docs/reference/method.md, section 2c).

    Parameters
    ----------
    f : vectorised, [0, 1] -> reals; called on one-dimensional arrays. f(0) may be -inf.
    beta : KL strength, > 0, any shape; equal values are integrated once.

    Returns
    -------
    log Z, to about 1e-13 + 1e-16 |f|/beta.

    Raises
    ------
    ObjectiveError : beta <= 0, or no convergence.
    """
    betas = positive_beta(beta)
    distinct, inverse = np.unique(betas, return_inverse=True)
    values = np.array([_log_integral(f, one) for one in distinct.tolist()])
    return np.asarray(values[inverse].reshape(betas.shape)[()], dtype=np.float64)


def _log_integral(f: Callable[[FloatArray], FloatArray], beta: float) -> float:
    edges = np.append(1.0 - 2.0 ** -np.arange(51.0), 1.0)
    left, right = edges[:-1], edges[1:]
    finished = -np.inf
    for _ in range(_DEPTH):
        middle = 0.5 * (left + right)
        whole, _ = _panels(f, beta, left, right)
        lower, _ = _panels(f, beta, left, middle)
        upper, hidden = _panels(f, beta, middle, right)
        value = np.logaddexp(lower, upper)
        with np.errstate(divide="ignore"):  # log 0 = -inf: no error
            error = np.maximum(value + np.log(np.abs(np.expm1(whole - value))), hidden)
        total = float(np.logaddexp.reduce(value, initial=finished))
        # Rounding of f moves exp(f/beta) by 2^-52 |f|/beta: a smaller error cannot be reached.
        noise = np.finfo(np.float64).eps * float(np.abs(f(np.array([0.5, 1.0]))).max()) / beta
        # A panel at the spacing of float64 holds a step that no number can place better.
        coarse = (error > total + np.log(max(_PRECISION, 4 * noise))) & (right - left > 4 * np.spacing(right))
        finished = float(np.logaddexp.reduce(value[~coarse], initial=finished))
        if not coarse.any():
            return finished
        left, right = (
            np.concatenate([left[coarse], middle[coarse]]),
            np.concatenate([middle[coarse], right[coarse]]),
        )
    raise ObjectiveError(
        f"the integral of exp(f/beta) did not converge at beta = {beta}",
        remedy="f must be non-decreasing and finite on (0, 1]",
    )


def _panels(
    f: Callable[[FloatArray], FloatArray], beta: float, left: FloatArray, right: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(log integral, log of what a step behind the last node may hide), [panels] each."""
    half = 0.5 * (right - left)
    nodes = left[:, None] + half[:, None] * (1.0 + _NODES)
    exponent = np.asarray(f(nodes.ravel()), dtype=np.float64).reshape(nodes.shape) / beta
    top = exponent[:, -1]  # f is non-decreasing
    value = top + np.log(half * (np.exp(exponent - top[:, None]) @ _WEIGHTS))
    end = np.asarray(f(right), dtype=np.float64) / beta
    hidden = np.where(end - top > 0.01, np.log(half * (1.0 - _NODES[-1])) + end, -np.inf)
    return value, hidden
