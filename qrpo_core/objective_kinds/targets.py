"""Objectives that fit each completion to a target, which follows from the references of its prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qrpo_core.objective_kinds.base import Batch, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from qrpo_core.objective.density_ratio import DensityRatio
    from qrpo_core.objective.expected_weights import ExpectedWeights
    from qrpo_core.objective.quantiles import RankCounts, TieMethod
    from qrpo_core.objective.targets import CalibratedTargets


@dataclass(frozen=True, eq=False)
class Pool:
    """Training completions, [rows], and the references that they are ranked among, [references].

    codes, reference_codes : the prompt of each, numbered from 0; every prompt has a reference.
    rewards, reference_rewards : their rewards. counts : the rank counts of the completions.
    in_pool : whether the training completions are references themselves.
    lengths : [rows] completion tokens. seeds, reference_seeds : uint64 seeds that break ties, from the ids.
    """

    codes: Any
    rewards: Any
    reference_codes: Any
    reference_rewards: Any
    in_pool: bool
    counts: RankCounts
    lengths: Any
    seeds: Any
    reference_seeds: Any


class TargetObjective(Objective):
    """Regression of beta log(pi/pi_ref) on a target in reward units, squared or absolute.

    normalised : whether E_ref exp(target/beta) is to be 1, so that the normalisation check applies.
    """

    good_training = "loss and error fall and level off, the log-ratio moves towards its target"
    shares = frozenset({"beta", "loss", "loss_scale", "target_clip"})
    fits_rewards = True
    has_target = True
    normalised: ClassVar[bool] = True

    @property
    def loss_unit(self) -> str:
        return "squared reward units" if self.config.loss == "mse" else "reward units"

    @property
    def fewest_references(self) -> int:
        """The fewest scored references of a prompt, one of which is left out of its own ranking."""
        return 2

    @property
    def needs_them(self) -> str:
        """What sets `fewest_references`, for an error."""
        return f"objective {self.kind!r}"

    @abstractmethod
    def targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        """The targets of the training completions. how : normaliser and tie_tolerance."""

    @abstractmethod
    def reference_targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        """The targets of the references, each left out of its own ranking, at constant beta."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The settings behind the targets, for the report."""

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import qrpo_absolute_loss, qrpo_squared_loss

        loss = qrpo_squared_loss if self.config.loss == "mse" else qrpo_absolute_loss
        values = loss(policy_logprob, batch["ref_logprob"], batch["target"], batch["beta"])
        return self.scaled(values, batch)

    def betas(self, batch: Batch) -> Tensor:
        return batch["beta"]


class QuantileObjective(TargetObjective):
    """A target that is a density ratio on the quantile: beta times log w(R_q)."""

    shares = TargetObjective.shares - {"beta"} | {"normaliser", "tie_tolerance"}

    @abstractmethod
    def ratio(self, pool: Pool | None = None) -> DensityRatio:
        """The density ratio w, with its integral. pool : None where one ratio is to stand for all prompts."""

    @property
    def tie_method(self) -> TieMethod:
        """How ties count in the quantile."""
        chosen: TieMethod = self.config.tie_method
        return chosen

    @property
    def fewest_references(self) -> int:
        return 1 + max(1, self.ratio().transform.min_references)

    @property
    def needs_them(self) -> str:
        return f"transform {self.ratio().transform.name!r}"

    def targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        from qrpo_core.objective.targets import calibrated_targets

        config, ratio = self.config, self.ratio(pool)
        return calibrated_targets(
            pool.counts,
            transform=ratio.transform,
            beta=ratio.beta,
            tie_method=self.tie_method,
            prompt=pool.codes,
            reference_prompt=pool.reference_codes,
            reference_rewards=pool.reference_rewards,
            seeds=pool.seeds,
            reference_seeds=pool.reference_seeds,
            lengths=pool.lengths if config.beta_scale == "by_length" else None,
            beta_max=config.beta_max,
            **how,
        )

    def reference_targets(self, pool: Pool, **how: Any) -> CalibratedTargets:
        from qrpo_core.objective.targets import reference_targets

        ratio = self.ratio(pool)
        return reference_targets(
            pool.reference_codes,
            pool.reference_rewards,
            transform=ratio.transform,
            beta=ratio.beta,
            tie_method=self.tie_method,
            reference_seeds=pool.reference_seeds,
            **how,
        )

    def expected_weights(
        self, pool: Pool, targets: CalibratedTargets, codes: Any, n: Any, *, in_pool: bool
    ) -> ExpectedWeights:
        """What the normaliser of `targets` implies for their mean of exp(target/beta).

        codes, n : the prompt and the number of references of each target. in_pool : whether its completion is
        one of the pool's references.
        """
        from qrpo_core.objective.expected_weights import expected_weights

        return expected_weights(
            targets,
            n,
            transform=self.ratio(pool).transform,
            prompt=codes,
            reference_prompt=pool.reference_codes,
            reference_rewards=pool.reference_rewards,
            reference_seeds=pool.reference_seeds,
            in_pool=in_pool,
        )
