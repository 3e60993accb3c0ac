"""Supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrpo_core.objective_kinds.base import Batch, Objective

if TYPE_CHECKING:
    from torch import Tensor


class SFT(Objective):
    """-log pi of the completion, or of a pair's chosen one. beta is in logged metrics only."""

    kind = "sft"
    short, long = "SFT", "supervised fine-tuning"
    good_training = "the loss falls and levels off"
    items = "chosen"
    shares = frozenset({"beta", "loss_scale"})
    needs_reference = False
    only_logged = frozenset({"beta"})

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import sft_loss

        return self.scaled(sft_loss(policy_logprob), batch)
