"""DPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrpo_core.objective_kinds.base import Batch, Objective, sides

if TYPE_CHECKING:
    from torch import Tensor


class DPO(Objective):
    """DPO (docs/reference/method.md, section 6)."""

    kind = "dpo"
    short, long = "DPO", "Direct Preference Optimization"
    good_training = "the loss falls and levels off, accuracy and margin rise"
    items = "pairs"

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import dpo_loss

        return dpo_loss(*sides(policy_logprob), *sides(batch["ref_logprob"]), self.beta)
