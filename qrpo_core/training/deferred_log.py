"""A Trainer that logs every step without waiting for the device.

The Trainer reads the loss and the gradient norm of a step as numbers, and until they are there it gives the
device nothing to do. Here they are copied from the device while the next step runs, and logged after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from qrpo_core.training.metrics import Means, MetricSums


@dataclass(frozen=True)
class _Entry:
    """The entry of a step, with its means on their way. steps : since the entry before."""

    step: int
    epoch: float | None
    steps: int
    start_time: float
    learning_rate: float
    means: Means


class DeferredLogTrainer(Trainer):  # type: ignore[misc]
    """Logs the loss, the gradient norm and `_metrics` of a step once the next one is under way.

    Entries are those of the Trainer, in their order. None is pending when a checkpoint is written, and none
    after the last step.
    """

    _globalstep_last_logged: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics = MetricSums()
        self._pending: _Entry | None = None
        self._clipped: list[torch.Tensor] = []
        self._counted = 0

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """The Trainer's, which finds nothing left to log."""
        control, state, limit = self.control, self.state, self.args.max_grad_norm
        if (
            grad_norm is not None and limit and state.global_step > self._counted
        ):  # an epoch's end calls again
            self._clipped.append((_whole(grad_norm, tr_loss) > limit).double())
            self._counted = state.global_step
        if control.should_log and state.global_step > self._globalstep_last_logged:
            self._log_pending()
            steps = state.global_step - self._globalstep_last_logged
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            numbers = {"loss": tr_loss / steps}
            if grad_norm is not None:
                numbers["grad_norm"] = _whole(grad_norm, tr_loss)
            if self._clipped:
                numbers["clipped_steps"] = torch.stack(self._clipped).sum()
                self._clipped = []
            means = self._metrics.take(numbers, self.accelerator.gather)
            self._pending = _Entry(state.global_step, state.epoch, steps, start_time, rate, means)
            tr_loss.zero_()
            self._globalstep_last_logged = state.global_step
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends or control.should_save or control.should_evaluate:
            self._log_pending()
        super()._maybe_log_save_evaluate(
            tr_loss,
            grad_norm,
            model,
            trial,
            epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=learning_rate,
        )

    def _log_pending(self) -> None:
        """Log the pending entry under its own step."""
        entry, self._pending = self._pending, None
        if entry is None:
            return
        means = entry.means.read()
        first = {name: means.pop(name) for name in ("loss", "grad_norm") if name in means}
        self._total_loss_scalar += first["loss"] * entry.steps
        now = self.state.global_step, self.state.epoch
        self.state.global_step, self.state.epoch = entry.step, entry.epoch
        try:
            self.log(first | {"learning_rate": entry.learning_rate} | means, entry.start_time)
        finally:
            self.state.global_step, self.state.epoch = now


def _whole(norm: Any, like: torch.Tensor) -> torch.Tensor:
    """A gradient norm as a scalar on the device; FSDP2's is in parts."""
    if isinstance(norm, torch.Tensor):
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return torch.full_like(like, norm)
