"""REBEL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrpo_core.objective_kinds.base import Batch, Objective, sides

if TYPE_CHECKING:
    from torch import Tensor


class REBEL(Objective):
    """REBEL (docs/reference/method.md, section 6), on raw rewards."""

    kind = "rebel"
    short, long = "REBEL", "Regression to Relative Reward Based RL"
    good_training = "the loss falls and levels off, accuracy and margin rise"
    items = "pairs"
    fits_rewards = True

    @property
    def loss_unit(self) -> str:
        return "squared nats"

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        from qrpo_core.objective.losses import rebel_loss

        references, rewards = sides(batch["ref_logprob"]), sides(batch["reward"])
        return rebel_loss(*sides(policy_logprob), *references, *rewards, self.beta)
