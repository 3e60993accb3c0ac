"""SimPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrpo_core.objective_kinds.base import Batch, Objective, sides

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(Objective):
    """SimPO (docs/reference/method.md, section 6). Compares mean log-probs a token; no reference model."""

    kind = "simpo"
    short, long = "SimPO", "Simple Preference Optimization"
    good_training = "the loss falls and levels off, accuracy and margin rise"
    items = "pairs"
    shares = frozenset({"beta", "gamma_beta_ratio"})
    needs_reference = False

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import simpo_loss

        lengths = sides(batch["length"])
        return simpo_loss(*sides(policy_logprob), *lengths, self.beta, self.config.gamma_beta_ratio)

    def compared(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        return policy_logprob / batch["length"]
