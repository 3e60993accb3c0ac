"""TUP's transform: the log odds of a label that is 0 up to a truncation, with its log partition.

TUP (Truncate-bad, Upweight-good, arXiv 2608.19748) labels a completion l = max(R_q - lambda, 0). Its fixed
point is pi/pi_ref = (l/(1 - l))^(1/beta)/Z: QRPO's density ratio with f(t) = log(l/(1 - l)), and
Z = integral over (0, 1 - lambda) of (t/(1 - t))^(1/beta) (docs/reference/method.md, section 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray
from qrpo_core.objective.transforms import RewardTransform

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)  # on [-1, 1]
_FAR = 50.0  # nats: exp(-50) is below the precision of float64
_WIDEST = 4.0  # of a panel, in log odds: the integrand has poles at +- i pi


@dataclass(frozen=True, eq=False)
class TruncatedLogit(RewardTransform):
    """f(t) = log(l/(1 - l)) with l = max(t - truncation, 0), 0 < truncation < 1; -inf up to there."""

    truncation: float
    name = "truncated_logit"

    def __post_init__(self) -> None:
        if not 0.0 < self.truncation < 1.0:
            raise ObjectiveError(
                f"truncation must lie between 0 and 1, got {self.truncation}",
                remedy="it is the quantile up to which completions are given up, such as 0.5",
            )

    @property
    def bounds(self) -> tuple[float, float]:
        return -np.inf, float(self._forward(np.ones(1))[0])

    def fitted(self, q: ArrayLike) -> FloatArray:
        """The label max(q - truncation, 0): TUP fits it by cross-entropy, and f is -inf where it is 0."""
        return np.maximum(np.asarray(q, dtype=np.float64) - self.truncation, 0.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        label = np.maximum(q - self.truncation, 0.0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(label) - np.log((1.0 - q) + self.truncation), dtype=np.float64)

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        """log of the mean of exp(f/beta) over [low, high]; -inf where the stretch is truncated."""
        columns = [column.ravel() for column in np.broadcast_arrays(low, high, 1.0 / beta)]
        keys, inverse = np.unique(np.stack(columns), axis=1, return_inverse=True)
        start, end, u = keys
        found = np.full(len(u), -np.inf)
        kept = end > self.truncation
        bottom, top = np.maximum(start[kept] - self.truncation, 0.0), end[kept] - self.truncation
        rest = (1.0 - end[kept]) + self.truncation  # 1 - top, where top is near 1
        found[kept] = log_odds_integral(bottom, top, rest, u[kept]) - np.log(end[kept] - start[kept])
        return np.asarray(found[inverse.ravel()].reshape(np.broadcast(low, high, beta).shape))


def log_odds_integral(bottom: FloatArray, top: FloatArray, rest: FloatArray, u: FloatArray) -> FloatArray:
    """log of the integral of (t/(1 - t))^u over [bottom, top], nats; all arguments [integrals].

    An incomplete beta function whose second argument, 1 - u, is negative for u > 1. In the log odds
    x = log(t/(1 - t)) the integrand exp(u x) t (1 - t) is log-concave, so panels that double in width from
    the scale at the upper end resolve it: for u from 0.1 to 1e4 to about 1e-14 + 1e-16 |log|.

    bottom, top : 0 <= bottom < top < 1. rest : 1 - top. u : > 0.
    """
    upper = np.log(top) - np.log(rest)
    with np.errstate(divide="ignore"):
        width = np.log1p((top - bottom) / bottom) + np.log1p((top - bottom) / rest)
    # To the left of x = 0 the logarithm falls with a slope of u or more, of u + 1 soon.
    reach = np.minimum(width, np.maximum(upper, 0.0) + _FAR)
    mode = np.minimum(upper, np.where(u < 1.0, 2.0 * np.arctanh(np.minimum(u, 1.0 - 1e-16)), np.inf))
    peak = _log_integrand(np.maximum(mode, upper - width), u)
    total, left = np.zeros_like(u), np.zeros_like(u)
    right = np.minimum(2.0 / np.maximum(u, 1.0), reach)
    step = right.copy()
    while (left < reach).any():
        half = 0.5 * (right - left)
        y = left[:, None] + half[:, None] * (1.0 + _NODES)
        values = np.exp(_log_integrand(upper[:, None] - y, u[:, None]) - peak[:, None])
        total += half * (values @ _WEIGHTS)
        step = np.minimum(2.0 * step, _WIDEST)
        left, right = right, np.minimum(right + step, reach)
    return np.asarray(peak + np.log(total), dtype=np.float64)


def _log_integrand(x: FloatArray, u: FloatArray) -> FloatArray:
    """log of exp(u x) t (1 - t) at t = 1/(1 + exp(-x))."""
    return np.asarray(u * x - np.abs(x) - 2.0 * np.log1p(np.exp(-np.abs(x))), dtype=np.float64)
