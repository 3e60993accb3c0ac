"""Reward transforms f, each with its own population partition function (docs/reference/method.md, section 2).

Source: Matrenok, Moalla, Gulcehre 2025, "Quantile Reward Policy Optimization: Alignment with Pointwise
Regression and Exact Partition Functions" (arXiv 2507.08068), "the QRPO paper" below. With R_q uniform on
(0, 1) under the reference policy, Z = E_ref exp(f(R_q)/beta) = integral over (0, 1) of exp(f(t)/beta): a
constant that depends on f and beta only. All logs are natural; log Z is in nats, f and beta in reward units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, listed, positive_beta, quantiles_in_range
from qrpo_core.objective.quadrature import quadrature_log_partition
from qrpo_core.objective.stretches import identity_log_mean, log_log_mean, normal_log_mean, power_log_mean


@dataclass(frozen=True, eq=False)
class RewardTransform(ABC):
    """A non-decreasing f on [0, 1] with its log partition."""

    name: ClassVar[str]
    min_references: ClassVar[int] = 1
    """Fewest references a prompt with which the transform still carries a signal."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The transform's parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """(f(0), f(1)); either may be infinite."""

    def apply(self, q: ArrayLike, num_references: ArrayLike | None = None) -> FloatArray:
        """f(q), elementwise, in reward units.

        Parameters
        ----------
        q : quantiles in [0, 1], any shape.
        num_references : references behind each quantile, broadcast against q. With it, `log` and the normal
            transforms clamp q to [1/n, 1 - 1/n] (log: [1/n, 1]) as the published code does, because a rank
            among n references can be 0 or 1, where they are infinite. Without it f is exact.

        Raises
        ------
        ObjectiveError : q outside [0, 1], or fewer references than `min_references`.
        """
        quantiles = quantiles_in_range(q)
        if num_references is not None:
            n = np.asarray(num_references)
            self.check_references(n)
            quantiles = self._clamp(quantiles, 1.0 / n)
        return np.asarray(self._forward(quantiles)[()], dtype=np.float64)

    def fitted(self, q: ArrayLike) -> FloatArray:
        """What the loss fits at these quantiles, whose error more references reduce: f(q), reward units."""
        return self.apply(q)

    def log_partition(self, beta: ArrayLike) -> FloatArray:
        """Population log Z(beta) in nats, in the shape of beta; 1e-12 relative for beta in [1e-5, 1e3].

        Raises ObjectiveError for a beta that is not finite or <= 0.
        """
        return self.log_mean(0.0, 1.0, beta)

    def log_mean(self, low: ArrayLike, high: ArrayLike, beta: ArrayLike) -> FloatArray:
        """log of the mean of exp(f(t)/beta) over [low, high], in nats; log Z is that of [0, 1].

        Parameters
        ----------
        low, high, beta : broadcast; 0 <= low < high <= 1, beta > 0. f is exact here, without a clamp.

        Raises
        ------
        ObjectiveError : an end outside [0, 1], low >= high, beta not finite or <= 0.
        """
        ends, betas = (quantiles_in_range(low), quantiles_in_range(high)), positive_beta(beta)
        if not np.less(*ends).all():
            raise ObjectiveError("a stretch of quantiles needs low < high")
        return np.asarray(self._log_mean(*ends, betas)[()], dtype=np.float64)

    def check_references(self, num_references: ArrayLike, *, where: str | None = None) -> None:
        """Raise ObjectiveError where a prompt has fewer references than `min_references`."""
        n = np.atleast_1d(np.asarray(num_references))
        few = np.unique(n[n < self.min_references])
        if len(few):
            raise ObjectiveError(
                f"transform {self.name!r} needs at least {self.min_references} references per prompt, "
                f"got n = {listed(few)}",
                where=where,
                remedy="with fewer, all clamped quantiles are equal and the targets carry no signal; "
                "draw more references or use 'identity'",
            )

    def at(self, prompt: NDArray[np.int64]) -> RewardTransform:
        """The transform of these prompts (an index array); itself unless parameters differ by prompt."""
        return self

    @property
    def varies_by_prompt(self) -> bool:
        """Whether a parameter is an array with one entry per prompt."""
        return False

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self.params, other.params
        return all(np.array_equal(mine[key], theirs[key]) for key in mine)

    def __hash__(self) -> int:
        return hash(self.name)

    def _clamp(self, q: FloatArray, step: FloatArray) -> FloatArray:
        return q

    @abstractmethod
    def _forward(self, q: FloatArray) -> FloatArray: ...

    @abstractmethod
    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray: ...


@dataclass(frozen=True, eq=False)
class Identity(RewardTransform):
    """f(t) = t, the paper's default; Z = beta (exp(1/beta) - 1).

    The published code drops the 1 (QRPO paper, its Eq. 11): off by 0.073 in beta log Z at beta = 0.5.
    """

    name = "identity"
    bounds = (0.0, 1.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        return q

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return identity_log_mean(low, high, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class Square(RewardTransform):
    """f(t) = t^2; Z = sqrt(beta) exp(1/beta) Dawson(1/sqrt(beta))."""

    name = "square"
    bounds = (0.0, 1.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        return q * q

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return power_log_mean(2.0, low, high, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class Sqrt(RewardTransform):
    """f(t) = sqrt(t); Z = 2 beta exp(1/beta) ((1 - beta) + beta exp(-1/beta))."""

    name = "sqrt"
    bounds = (0.0, 1.0)

    def _forward(self, q: FloatArray) -> FloatArray:
        return np.sqrt(q)

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return power_log_mean(0.5, low, high, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class Power(RewardTransform):
    """f(t) = t^p, p > 0; Z = 1F1(1/p; 1 + 1/p; 1/beta)."""

    exponent: float
    name = "power"
    bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.exponent) and self.exponent > 0):
            raise ObjectiveError(f"power needs a finite exponent > 0, got {self.exponent}")

    def _forward(self, q: FloatArray) -> FloatArray:
        return np.asarray(q**self.exponent, dtype=np.float64)

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return power_log_mean(self.exponent, low, high, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class Log(RewardTransform):
    """f(t) = log t; Z = beta/(1 + beta). Its optimum is exactly Best-of-N with N = 1 + 1/beta."""

    name = "log"
    bounds = (-np.inf, 0.0)
    min_references = 2  # n = 1: everything is clamped to 1, so every target is 0

    def _clamp(self, q: FloatArray, step: FloatArray) -> FloatArray:
        return np.maximum(q, step)

    def _forward(self, q: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):
            return np.log(q)

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return log_log_mean(low, high, 1.0 / beta)


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

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return normal_log_mean(low, high, 1.0 / beta)


@dataclass(frozen=True, eq=False)
class ScaledNormal(Normal):
    """f(t) = mean + std Phi^-1(t); log Z = mean/beta + std^2/(2 beta^2).

    mean and std are numbers, or arrays with one entry per prompt. With arrays, prompt codes are indices into
    them, and `at(prompt)` gives the transform of those prompts.
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
        return ScaledNormal(*(self._at(name, np.asarray(self.params[name]), prompt) for name in self.params))

    @staticmethod
    def _at(name: str, values: FloatArray, prompt: NDArray[np.int64]) -> FloatArray:
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

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        return self.mean / beta + normal_log_mean(low, high, self.std / beta)


@dataclass(frozen=True, eq=False)
class Custom(RewardTransform):
    """A bounded, non-decreasing, vectorised f of the caller, steps allowed; log Z by quadrature."""

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

    def _log_mean(self, low: FloatArray, high: FloatArray, beta: FloatArray) -> FloatArray:
        columns = np.broadcast_arrays(low, high, beta)
        keys, inverse = np.unique(np.stack([c.ravel() for c in columns]), axis=1, return_inverse=True)
        values = [float(quadrature_log_partition(self._on(a, b), one)) for a, b, one in keys.T.tolist()]
        return np.array(values)[inverse.ravel()].reshape(columns[0].shape)

    def _on(self, low: float, high: float) -> Callable[[FloatArray], FloatArray]:
        """f on [low, high] as a function on [0, 1]."""
        if (low, high) == (0.0, 1.0):
            return self.f
        return lambda t: self.f(np.clip(low + (high - low) * t, low, high))


_TRANSFORMS: dict[str, type[RewardTransform]] = {
    kind.name: kind for kind in (Identity, Log, Square, Sqrt, Power, Normal, ScaledNormal, Custom)
}
TRANSFORM_NAMES = tuple(_TRANSFORMS)


def get_transform(name: str, **params: Any) -> RewardTransform:
    """The transform of that name and those parameters.

    identity, log, square, sqrt, power(exponent), normal, scaled_normal(mean, std) and custom(f).

    Raises
    ------
    ObjectiveError : unknown name, missing or unknown parameters, or a value out of range.
    """
    if name not in _TRANSFORMS:
        raise ObjectiveError(f"unknown transform {name!r}", remedy=f"one of {', '.join(TRANSFORM_NAMES)}")
    known = [field.name for field in fields(_TRANSFORMS[name])]
    if set(params) != set(known):
        raise ObjectiveError(
            f"transform {name!r} takes {', '.join(known) or 'no parameters'}, "
            f"got {', '.join(params) or 'none'}"
        )
    return _TRANSFORMS[name](**params)
