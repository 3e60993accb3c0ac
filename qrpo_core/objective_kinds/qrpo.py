"""QRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrpo_core.objective_kinds.targets import Pool, QuantileObjective

if TYPE_CHECKING:
    from qrpo_core.objective.density_ratio import DensityRatio


class QRPO(QuantileObjective):
    """Regression of beta log(pi/pi_ref) on the calibrated target; each example has its beta.

    Source: docs/reference/method.md, section 1.
    """

    kind = "qrpo"
    short, long = "QRPO", "Quantile Reward Policy Optimization"
    shares = QuantileObjective.shares | {
        "beta",
        "transform",
        "exponent",
        "tie_method",
        "beta_scale",
        "beta_max",
    }

    def ratio(self, pool: Pool | None = None) -> DensityRatio:
        from qrpo_core.objective.density_ratio import DensityRatio
        from qrpo_core.objective.transforms import get_transform

        name, params = self.config.transform, {}
        if name == "power":
            params = {"exponent": self.config.exponent}
        elif name == "scaled_normal":
            name, params = ("normal", {}) if pool is None else (name, _moments(pool))
        return DensityRatio(get_transform(name, **params), self.beta)

    def facts(self) -> dict[str, Any]:
        return {"tie_method": self.config.tie_method, "transform": self.config.transform, "beta": self.beta}


def _moments(pool: Pool) -> dict[str, Any]:
    """Mean and standard deviation (divisor n - 1) of the references of each prompt."""
    import numpy as np

    codes, rewards = pool.reference_codes, pool.reference_rewards
    sizes = np.bincount(codes)
    mean = np.bincount(codes, rewards) / sizes
    square = np.bincount(codes, (rewards - mean[codes]) ** 2)
    return {"mean": mean, "std": np.sqrt(square / np.maximum(sizes - 1, 1))}
