"""From a batch to losses: each objective of `qrpo_core.objective.losses` on the rows of the collator.

An objective takes the policy's log-probs [rows] and the collator's batch, and gives one loss an item. It
knows what items it takes, which beta its log-ratios count with, and by what a pair is compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qrpo_core.objective.losses import (
    divide_by_length,
    dpo_loss,
    qrpo_absolute_loss,
    qrpo_squared_loss,
    rebel_loss,
    sft_loss,
    simpo_loss,
)
from qrpo_core.train.config import ObjectiveConfig, ObjectiveKind

Batch = Mapping[str, Tensor]
#: (losses [items], lengths [items]) → [items].
Scale = Callable[[Tensor, Tensor], Tensor]


class TrainingObjective(ABC):
    """One objective.

    kind : its name in the configuration.
    pairwise : whether an item is a pair (rows 2i and 2i + 1) rather than one example.
    needs_reference : whether ref_logprob is in the loss.
    has_target : whether each row has a calibrated target.
    """

    kind: ClassVar[ObjectiveKind]
    pairwise: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    has_target: ClassVar[bool] = False
    beta: float

    @abstractmethod
    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        """One loss an item, [items], from log pi(y|x) [rows] in nats and the collator's batch."""

    def betas(self, batch: Batch) -> Tensor:
        """KL strength of each row, [rows]: what makes its log-ratio an implicit reward."""
        return torch.full_like(batch["ref_logprob"], self.beta)

    def score(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        """What the two rows of a pair are compared by, [rows]: the log-ratio, nats."""
        return policy_logprob - batch["ref_logprob"]


@dataclass(frozen=True)
class QRPO(TrainingObjective):
    """Regression of beta log(pi/pi_ref) on the calibrated target (method.md 1); beta is each example's."""

    kind: ClassVar[ObjectiveKind] = "qrpo"
    has_target: ClassVar[bool] = True
    beta: float
    residual_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    scale: Scale

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        loss = self.residual_loss(policy_logprob, batch["ref_logprob"], batch["target"], batch["beta"])
        return self.scale(loss, batch["length"])

    def betas(self, batch: Batch) -> Tensor:
        return batch["beta"]


@dataclass(frozen=True)
class DPO(TrainingObjective):
    """method.md 6."""

    kind: ClassVar[ObjectiveKind] = "dpo"
    pairwise: ClassVar[bool] = True
    beta: float

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        return dpo_loss(*_halves(policy_logprob), *_halves(batch["ref_logprob"]), self.beta)


@dataclass(frozen=True)
class SimPO(TrainingObjective):
    """method.md 6. A pair is compared by mean log-prob a token; no reference is needed."""

    kind: ClassVar[ObjectiveKind] = "simpo"
    pairwise: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    beta: float
    gamma_beta_ratio: float

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        lengths = _halves(batch["length"])
        return simpo_loss(*_halves(policy_logprob), *lengths, self.beta, self.gamma_beta_ratio)

    def score(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        return policy_logprob / batch["length"]


@dataclass(frozen=True)
class REBEL(TrainingObjective):
    """method.md 6; raw rewards."""

    kind: ClassVar[ObjectiveKind] = "rebel"
    pairwise: ClassVar[bool] = True
    beta: float

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        references, rewards = _halves(batch["ref_logprob"]), _halves(batch["reward"])
        return rebel_loss(*_halves(policy_logprob), *references, *rewards, self.beta)


@dataclass(frozen=True)
class SFT(TrainingObjective):
    """-log pi of the completion. beta is in logged metrics only."""

    kind: ClassVar[ObjectiveKind] = "sft"
    needs_reference: ClassVar[bool] = False
    beta: float
    scale: Scale

    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        return self.scale(sft_loss(policy_logprob), batch["length"])


def make_objective(config: ObjectiveConfig) -> TrainingObjective:
    """The objective that a configuration names."""
    return _MAKERS[config.kind](config)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, each [items], of adjacent rows."""
    return rows[0::2], rows[1::2]


def _unscaled(loss: Tensor, lengths: Tensor) -> Tensor:
    return loss


_RESIDUAL_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mse": qrpo_squared_loss,
    "mae": qrpo_absolute_loss,
}
_SCALES: dict[str, Scale] = {"constant": _unscaled, "by_length": divide_by_length}
_MAKERS: dict[ObjectiveKind, Callable[[ObjectiveConfig], TrainingObjective]] = {
    "qrpo": lambda config: QRPO(config.beta, _RESIDUAL_LOSSES[config.loss], _SCALES[config.loss_scale]),
    "dpo": lambda config: DPO(config.beta),
    "simpo": lambda config: SimPO(config.beta, config.gamma_beta_ratio),
    "rebel": lambda config: REBEL(config.beta),
    "sft": lambda config: SFT(config.beta, _SCALES[config.loss_scale]),
}
