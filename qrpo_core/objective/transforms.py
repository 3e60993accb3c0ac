"""Reward transforms f, each in one value with its own population partition function (method.md section 2).

Source: Matrenok, Moalla, Gulcehre 2025, "Quantile Reward Policy Optimization: Alignment with Pointwise
Regression and Exact Partition Functions" (arXiv 2507.08068), "the QRPO paper" below. With R_q uniform on
(0, 1) under the reference policy, Z = E_ref exp(f(R_q)/beta) = integral over (0, 1) of exp(f(t)/beta): a
constant that depends on f and beta only. All logs are natural; log Z is in nats, f and beta in reward units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, listed
from qrpo_core.objective.quadrature import quadrature_log_partition
from qrpo_core.objective.special import log_kummer
from qrpo_core.objective.transform_base import RewardTransform

__all__ = ["TRANSFORM_NAMES", "RewardTransform", "get_transform"]


@dataclass(frozen=True, eq=False)
class Identity(RewardTransform):
    """f(t) = t, the paper's default; Z = beta (exp(1/beta) - 1).

    The published code drops the 1 (QRPO paper, its Eq. 11): off by 0.073 in beta log Z at beta = 0.5.
    """

    name = "identity"
    bounds = (0.0, 1.0)
    slope_at_one = (1.0, 0.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        return q

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        u = 1.0 / beta
        # exp(1/beta) overflows float64 below beta = 0.00141: take 1/beta out of the logarithm. From beta =
        # 1 up the series keeps the relative accuracy that log(expm1(u)/u) loses as log Z tends to 0.
        return np.where(u > 1.0, u - np.log(u) + np.log1p(-np.exp(-u)), log_kummer(1.0, np.minimum(u, 1.0)))


@dataclass(frozen=True, eq=False)
class Square(RewardTransform):
    """f(t) = t^2; Z = sqrt(beta) exp(1/beta) Dawson(1/sqrt(beta))."""

    name = "square"
    bounds = (0.0, 1.0)
    slope_at_one = (2.0, 2.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        return q * q

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        from scipy.special import dawsn

        u = 1.0 / beta
        closed = u - 0.5 * np.log(u) + np.log(dawsn(np.sqrt(u)))
        return np.where(u > 1.0, closed, log_kummer(0.5, np.minimum(u, 1.0)))


@dataclass(frozen=True, eq=False)
class Sqrt(RewardTransform):
    """f(t) = sqrt(t); Z = 2 beta exp(1/beta) ((1 - beta) + beta exp(-1/beta))."""

    name = "sqrt"
    bounds = (0.0, 1.0)
    slope_at_one = (0.5, -0.25)

    def _forward(self, q: FloatArray) -> FloatArray:
        return np.sqrt(q)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        u = 1.0 / beta
        # Above beta = 1 the two terms of the last factor have opposite signs: the series takes over.
        below = np.minimum(beta, 1.0)
        closed = np.log(2.0 * below) + 1.0 / below + np.log((1.0 - below) + below * np.exp(-1.0 / below))
        return np.where(u > 1.0, closed, log_kummer(2.0, np.minimum(u, 1.0)))


@dataclass(frozen=True, eq=False)
class Power(RewardTransform):
    """f(t) = t^p, p > 0; Z = 1F1(1/p; 1 + 1/p; 1/beta)."""

    exponent: float
    name = "power"
    bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.exponent) and self.exponent > 0):
            raise ObjectiveError(f"power needs a finite exponent > 0, got {self.exponent}")

    @property
    def slope_at_one(self) -> tuple[float, float]:
        return (self.exponent, self.exponent * (self.exponent - 1.0))

    def _forward(self, q: FloatArray) -> FloatArray:
        return np.asarray(q**self.exponent, dtype=np.float64)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        return log_kummer(1.0 / self.exponent, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class Log(RewardTransform):
    """f(t) = log t; Z = beta/(1 + beta). Its optimum is Best-of-N with N = 1 + 1/beta, exactly."""

    name = "log"
    bounds = (-np.inf, 0.0)
    slope_at_one = (1.0, -1.0)
    min_references = 2  # n = 1: everything is clamped to 1, so every target is 0

    def _clamp(self, q: FloatArray, step: FloatArray) -> FloatArray:
        return np.maximum(q, step)

    def _forward(self, q: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):
            return np.log(q)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        return -np.log1p(1.0 / beta)


@dataclass(frozen=True, eq=False)
class Normal(RewardTransform):
    """f(t) = Phi^-1(t); log Z = 1/(2 beta^2), the cumulant function of a standard normal at 1/beta."""

    name = "normal"
    bounds = (-np.inf, np.inf)
    min_references = 3  # n = 1: [1, 0] is empty (-inf in the published code); n = 2: only 1/2 is left

    def _clamp(self, q: FloatArray, step: FloatArray) -> FloatArray:
        return np.clip(q, step, 1.0 - step)

    def _forward(self, q: FloatArray) -> FloatArray:
        from scipy.special import ndtri

        return np.asarray(ndtri(q), dtype=np.float64)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        return 0.5 / beta**2


@dataclass(frozen=True, eq=False)
class ScaledNormal(Normal):
    """f(t) = mean + std Phi^-1(t); log Z = mean/beta + std^2/(2 beta^2).

    mean and std are numbers, or arrays with one entry per prompt: then `at(prompt)` picks the prompts' own,
    and the pipeline's prompt codes are indices into them.
    """

    mean: float | FloatArray
    std: float | FloatArray
    name = "scaled_normal"

    def __post_init__(self) -> None:
        mean, std = np.asarray(self.mean, dtype=np.float64), np.asarray(self.std, dtype=np.float64)
        if not np.isfinite(mean).all() or not (np.isfinite(std) & (std >= 0)).all():
            raise ObjectiveError("scaled_normal needs finite means and finite standard deviations >= 0")

    @property
    def varies_by_prompt(self) -> bool:
        return np.ndim(self.mean) > 0 or np.ndim(self.std) > 0

    def at(self, prompt: NDArray[np.int64]) -> ScaledNormal:
        picked = [
            self._pick(name, np.asarray(self.params[name], dtype=np.float64), prompt) for name in self.params
        ]
        return ScaledNormal(*picked)

    @staticmethod
    def _pick(name: str, values: FloatArray, prompt: NDArray[np.int64]) -> FloatArray:
        if values.ndim == 0:
            return values
        if prompt.size and not 0 <= int(prompt.min()) <= int(prompt.max()) < len(values):
            raise ObjectiveError(
                f"scaled_normal has {name} for {len(values)} prompts; "
                f"codes run from {prompt.min()} to {prompt.max()}",
                remedy="number the prompts 0, 1, 2, ... in the order of the array",
            )
        return values[prompt]

    def _forward(self, q: FloatArray) -> FloatArray:
        standard = super()._forward(q)
        with np.errstate(invalid="ignore"):  # std 0 times an infinite Phi^-1: f is the constant mean
            scaled = np.where(np.asarray(self.std) == 0, 0.0, self.std * standard)
        return np.asarray(self.mean + scaled, dtype=np.float64)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        return np.asarray(self.mean / beta + 0.5 * (self.std / beta) ** 2, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Custom(RewardTransform):
    """Any non-decreasing, bounded, vectorised f on [0, 1], steps allowed; log Z by quadrature."""

    f: Callable[[FloatArray], FloatArray]
    name = "custom"

    def __post_init__(self) -> None:
        grid = np.linspace(0.0, 1.0, 1025)
        try:
            values = np.asarray(self.f(grid), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ObjectiveError(
                f"custom transform cannot be applied to an array: {error}",
                remedy="wrap it in numpy.vectorize",
            ) from error
        if values.shape != grid.shape or not np.isfinite(values).all():
            raise ObjectiveError("custom transform must give one finite number for each quantile in [0, 1]")
        if (np.diff(values) < 0).any():
            where = grid[1:][np.diff(values) < 0]
            raise ObjectiveError(
                f"custom transform decreases before t = {listed(where)}",
                remedy="a better rank must not be worth less: give a non-decreasing f",
            )

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = np.asarray(self.f(np.array([0.0, 1.0])), dtype=np.float64).tolist()
        return (low, high)

    def _forward(self, q: FloatArray) -> FloatArray:
        return np.asarray(self.f(q.ravel()), dtype=np.float64).reshape(q.shape)

    def _log_partition(self, beta: FloatArray) -> FloatArray:
        return quadrature_log_partition(self.f, beta)


_KINDS: dict[str, type[RewardTransform]] = {
    kind.name: kind for kind in (Identity, Log, Square, Sqrt, Power, Normal, ScaledNormal, Custom)
}

TRANSFORM_NAMES = tuple(_KINDS)


def get_transform(name: str, **params: Any) -> RewardTransform:
    """The transform of that name and those parameters.

    identity, log, square, sqrt, power(exponent), normal, scaled_normal(mean, std) and custom(f).

    Raises
    ------
    ObjectiveError : unknown name, missing or unknown parameters, or a value out of range.
    """
    if name not in _KINDS:
        raise ObjectiveError(f"unknown transform {name!r}", remedy=f"one of {', '.join(TRANSFORM_NAMES)}")
    wanted = [field.name for field in fields(_KINDS[name])]
    if set(params) != set(wanted):
        raise ObjectiveError(
            f"transform {name!r} takes {', '.join(wanted) or 'no parameters'}, "
            f"got {', '.join(params) or 'none'}"
        )
    return _KINDS[name](**params)
