"""A target as one value: the density ratio on the quantile that it asks for, with its integral.

Every objective that fits quantiles asks for pi/pi_ref = w(R_q) with w >= 0 and integral 1 over (0, 1), R_q
the quantile reward. Here w(u) = exp(f(u)/beta)/Z: QRPO with its transform f; best-of-N with f = log; TUP with
f = log(l/(1 - l)), l = max(u - lambda, 0) (docs/reference/method.md, section 9).
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

from qrpo_core.objective.checks import FloatArray
from qrpo_core.objective.transforms import RewardTransform


@dataclass(frozen=True)
class DensityRatio:
    """w(u) = exp(f(u)/beta)/Z. transform : f and its log Z. beta : KL strength, reward units per nat."""

    transform: RewardTransform
    beta: float

    @property
    def log_integral(self) -> float:
        """log Z, the log of the integral of exp(f(u)/beta) over (0, 1), nats."""
        return float(self.transform.log_partition(self.beta))

    def log_ratio(self, u: ArrayLike) -> FloatArray:
        """log w(u) in nats, in the shape of u in [0, 1]; -inf where w is 0."""
        return self.transform.apply(u) / self.beta - self.log_integral
