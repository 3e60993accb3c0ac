"""A trainer whose checkpoints any number of processes can go on from.

torch's distributed checkpoint names each tensor and says which file has which part of it. So a training that
two processes began in shards goes on in one process, or in eight.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qrpo_core.training.trainer import QRPOTrainer

#: In a checkpoint: weights and optimiser states, the scheduler, the Trainer's state (history and step).
TENSORS, SCHEDULER, STATE = "tensors", "scheduler.pt", "trainer_state.json"

# Frozen weights are the starting policy's; a checkpoint of adapters has megabytes.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class ResumableTrainer(QRPOTrainer):
    """QRPOTrainer with checkpoints that do not depend on the number of processes, nor on how they share.

    DeepSpeed writes its own, which the same number of processes reads.
    """

    def gathered_weights(self) -> dict[str, torch.Tensor]:
        """All weights of the trained model, gathered tensor by tensor: in the first process only."""
        if self.is_deepspeed_enabled:
            gathered: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
            return gathered
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.args.world_size > 1)
        return cast(dict[str, torch.Tensor], get_model_state_dict(self.model, options=options))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_deepspeed_enabled:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        with _quiet():
            save(self._tensors(), storage_writer=FileSystemWriter(folder / TENSORS))
        self._save_rng_state(str(folder))
        if self.args.process_index == 0:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
            self.state.save_to_json(str(folder / STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Else with the optimiser, once that is there.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, found = Path(checkpoint), self._tensors()
        with _quiet():
            load(found, storage_reader=FileSystemReader(folder / TENSORS))
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
            options=_TRAINED,
        )
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    def _tensors(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=_TRAINED)
        return {"model": weights, "optimizer": optimizer}


def _quiet() -> Any:
    """One process has no process group, which torch reports."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
