"""What a reward transform is: f and its own population log-partition, in one value (method.md section 2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, listed, positive_beta, quantiles_in_range


@dataclass(frozen=True, eq=False)
class RewardTransform(ABC):
    """A non-decreasing f on [0, 1] and the log-partition that belongs to it."""

    name: ClassVar[str]
    min_references: ClassVar[int] = 1
    """Fewest references per prompt with which the transform still carries a signal."""

    @property
    def params(self) -> Mapping[str, Any]:
        """What the transform was made with, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """(f(0), f(1)), either of which may be infinite."""

    @property
    def slope_at_one(self) -> tuple[float, float] | None:
        """(f'(1), f''(1)) for the end-point expansion, or None where there is none to be had."""
        return None

    def apply(self, q: ArrayLike, num_references: ArrayLike | None = None) -> FloatArray:
        """f(q), elementwise, in reward units.

        Parameters
        ----------
        q : quantiles in [0, 1], any shape.
        num_references : references behind each quantile, broadcast against q. Given, `log` and the normal
            transforms clamp q to [1/n, 1 - 1/n] (log: [1/n, 1]) as the published code does, because a rank
            among n references can be 0 or 1 where they are infinite; too small an n is refused. Not given,
            f is exact, infinities included.

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

    def log_partition(self, beta: ArrayLike) -> FloatArray:
        """Population log Z(beta) in nats, in the shape of beta; 1e-12 relative for beta in [1e-5, 1e3].

        Raises
        ------
        ObjectiveError : beta not finite or <= 0.
        """
        return np.asarray(self._log_partition(positive_beta(beta))[()], dtype=np.float64)

    def check_references(self, num_references: ArrayLike, *, where: str | None = None) -> None:
        """Refuse, by name and with the reason, a transform that has nothing to say at this n."""
        n = np.atleast_1d(np.asarray(num_references))
        if (n < self.min_references).any():
            raise ObjectiveError(
                f"transform {self.name!r} needs at least {self.min_references} references per prompt, "
                f"got n = {listed(np.unique(n[n < self.min_references]))}",
                where=where,
                remedy="below that its clamped quantiles are all the same value, so no completion is told "
                "from another; draw more references or use 'identity'",
            )

    def at(self, prompt: NDArray[np.int64]) -> RewardTransform:
        """The transform for these prompts (an index array); itself unless parameters differ by prompt."""
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
    def _log_partition(self, beta: FloatArray) -> FloatArray: ...
