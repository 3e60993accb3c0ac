"""The best of N draws, as a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrpo_core.objective_kinds.base import Setting
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective

if TYPE_CHECKING:
    from qrpo_core.objective.density_ratio import DensityRatio


class BestOfN(QuantileObjective):
    """Regression on the density of the best of N reference draws, w(u) = N u^(N - 1) on the quantile u.

    It is QRPO's with f = log and beta = 1/(N - 1) (docs/reference/method.md, section 2), said as N.
    """

    kind = "best_of_n"
    short, long = "BoN", "the best of N draws as a policy"
    shares = QuantileObjective.shares | {"tie_method"}
    settings = (
        Setting(
            "candidates",
            float,
            4.0,
            "best_of_n: N, the draws of which the policy is to be the best; beta is 1/(N - 1).",
            {"ge": 1.001, "le": 1e6, "allow_inf_nan": False},
        ),
    )

    @property
    def beta(self) -> float:
        return 1.0 / (float(self.config.candidates) - 1.0)

    def ratio(self, pool: Pool | None = None) -> DensityRatio:
        from qrpo_core.objective.density_ratio import DensityRatio
        from qrpo_core.objective.transforms import get_transform

        return DensityRatio(get_transform("log"), self.beta)

    def facts(self) -> dict[str, Any]:
        return {
            "tie_method": self.config.tie_method,
            "candidates": self.config.candidates,
            "beta": self.beta,
        }
