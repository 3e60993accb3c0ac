"""A*-PO and OAPL: regression on the reward less the prompt's value."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qrpo_core.objective_kinds.base import Setting
from qrpo_core.objective_kinds.targets import Pool, TargetObjective

if TYPE_CHECKING:
    from qrpo_core.objective.targets import CalibratedTargets


class AStar(TargetObjective):
    """Regression on the raw reward less V = value_beta log mean_i exp( R_i/value_beta ) over the references.

    Source: docs/reference/method.md, section 9.
    """

    kind = "a_star"
    short, long = "A*-PO", "A* policy optimization, with the optimal value from references"
    settings = (
        Setting(
            "value_beta",
            float,
            0.5,
            "a_star: temperature of the value V, in reward units; small ones make it the best reference's.",
            {"ge": 1e-8, "le": 1e8, "allow_inf_nan": False},
        ),
    )
    normalised = False

    def targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        from qrpo_core.objective.values import value_targets

        return value_targets(
            pool.counts,
            pool.rewards,
            pool.codes,
            reference_prompt=pool.reference_codes,
            reference_rewards=pool.reference_rewards,
            beta=self.beta,
            value_beta=self.config.value_beta,
        )

    def reference_targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        from qrpo_core.objective.quantiles import leave_one_out_counts

        codes, rewards = pool.reference_codes, pool.reference_rewards
        counts = leave_one_out_counts(codes, rewards)
        return self.targets(replace(pool, codes=codes, rewards=rewards, counts=counts))

    def facts(self) -> dict[str, Any]:
        return {"value_beta": self.config.value_beta, "beta": self.beta}
