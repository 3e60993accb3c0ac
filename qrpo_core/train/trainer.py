"""`QRPOTrainer`: the regression of the log-ratio on stored targets, on transformers' Trainer.

FSDP, DeepSpeed, LoRA, checkpoints, schedulers and trackers come with the Trainer; what is written here is
the loss and what is logged beside it. The reference log-probs are data, so one model is in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from qrpo_core.data.collator import Collator, Example
from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.losses import qrpo_absolute_loss, qrpo_squared_loss
from qrpo_core.train.forward import policy_logprobs

#: One function per objective; (policy_logprob, ref_logprob, target, beta) [batch] → [batch].
LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": qrpo_squared_loss, "mae": qrpo_absolute_loss}


class QRPOTrainer(Trainer):  # type: ignore[misc]
    """Fits ``beta * log(pi / pi_ref)`` to calibrated targets (QRPO paper; method.md 1).

    Parameters
    ----------
    model : a causal language model of transformers.
    args : transformers.TrainingArguments with `remove_unused_columns=False`.
    train_dataset : a sequence of `Example`.
    loss : "mse" or "mae".
    pad_token_id : fills batches; never in the loss.

    The loss of an optimiser step is the mean over all examples of the step, however they are split into
    micro-batches and processes.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the examples of the whole accumulated batch

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Sequence[Example],
        *,
        loss: str = "mse",
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        if args.remove_unused_columns:
            raise ObjectiveError(
                "TrainingArguments.remove_unused_columns drops the targets", remedy="set it to False"
            )
        if loss not in LOSSES:
            raise ObjectiveError(f"unknown loss {loss!r}", remedy=f"one of {', '.join(LOSSES)}")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Collator(pad_token_id),
            **kwargs,
        )
        self.example_loss = LOSSES[loss]
        self.model_accepts_loss_kwargs = False  # the model's own loss is never asked for
        self._sums: dict[str, float] = defaultdict(float)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimiser step, and how many examples they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["target"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the examples' losses over the examples of the step (`num_items_in_batch`)."""
        policy = policy_logprobs(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
        )
        target, beta, reference = inputs["target"], inputs["beta"], inputs["ref_logprob"]
        losses = self.example_loss(policy.double(), reference, target, beta)
        count = num_items_in_batch if num_items_in_batch is not None else len(losses)
        # Gradients are averaged over processes, so a process's share counts world_size times.
        loss = losses.sum() * self.accelerator.num_processes / count
        self._record(policy.detach().double() - reference, target / beta, inputs["completion_mask"])
        return (loss, {"losses": losses}) if return_outputs else loss

    def _record(self, log_ratio: torch.Tensor, target: torch.Tensor, completion_mask: torch.Tensor) -> None:
        """Add up what is logged beside the loss; nats, means over examples."""
        self._sums["examples"] += len(target)
        self._sums["log_ratio"] += log_ratio.sum().item()
        self._sums["log_ratio_target"] += target.sum().item()
        self._sums["log_ratio_error"] += (target - log_ratio).abs().sum().item()
        self._sums["sign_agreement"] += (torch.sign(log_ratio) == torch.sign(target)).sum().item()
        self._sums["completion_tokens"] += completion_mask.sum().item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this trainer's means since the last call."""
        sums, self._sums = self._sums, defaultdict(float)
        if examples := sums.pop("examples", 0.0):
            logs = {**logs, **{name: total / examples for name, total in sums.items()}}
        super().log(logs, start_time)
