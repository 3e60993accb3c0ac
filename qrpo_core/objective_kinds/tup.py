"""TUP: truncate what is bad, weight up what is good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrpo_core.objective_kinds.base import Batch, Setting
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective

if TYPE_CHECKING:
    from torch import Tensor

    from qrpo_core.objective.density_ratio import DensityRatio
    from qrpo_core.objective.quantiles import TieMethod


class TUP(QuantileObjective):
    """Cross-entropy of the label max(R_q - lambda, 0) against sigmoid( beta log(pi/pi_ref) + beta log Z ).

    Its fixed point is the density ratio (l/(1 - l))^(1/beta)/Z, zero up to lambda (docs/reference/method.md,
    section 9). The quantile counts ties as R' <= R, the only way in which a prompt's best is never truncated.
    """

    kind = "tup"
    short, long = "TUP", "Truncate-bad, Upweight-good"
    good_training = "the loss falls and levels off, the prediction moves towards the label"
    shares = QuantileObjective.shares - {"loss"} | {"beta"}
    settings = (
        Setting(
            "truncation",
            float,
            0.5,
            "tup: lambda, the quantile up to which a completion's label is 0: the policy is to give it up.",
            {"ge": 1e-6, "le": 1 - 1e-6},
        ),
    )
    zero_density = True
    needs_log_partition = True

    @property
    def tie_method(self) -> TieMethod:
        return "weak"

    @property
    def loss_unit(self) -> str:
        return "nats"

    def ratio(self, pool: Pool | None = None) -> DensityRatio:
        from qrpo_core.objective.density_ratio import DensityRatio
        from qrpo_core.objective.truncated_logit import TruncatedLogit

        return DensityRatio(TruncatedLogit(self.config.truncation), self.beta)

    def facts(self) -> dict[str, Any]:
        return {"truncation": self.config.truncation, "beta": self.beta}

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import tup_loss

        own = batch["log_partition"], batch["beta"]
        return self.scaled(tup_loss(policy_logprob, batch["ref_logprob"], _labels(batch), *own), batch)

    def metrics(self, policy_logprob: Tensor, batch: Batch) -> dict[str, Tensor]:
        label = _labels(batch)
        log_ratio = policy_logprob - batch["ref_logprob"]
        prediction = (batch["beta"] * (log_ratio + batch["log_partition"])).sigmoid()
        return {
            "label": label,
            "prediction": prediction,
            "label_error": (label - prediction).abs(),
            "truncated": (label == 0).double(),
        }


def _labels(batch: Batch) -> Tensor:
    """max(R_q - lambda, 0), [rows]: the target is its log odds less beta log Z, -inf where it is 0."""
    return (batch["target"] + batch["beta"] * batch["log_partition"]).sigmoid()
