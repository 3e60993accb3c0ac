"""Train a policy on a training set and save it as a directory that `from_pretrained` loads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from qrpo_core.config import ModelConfig, ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.numerics import native_bfloat16, pick_device
from qrpo_core.errors import ObjectiveError
from qrpo_core.policy import load_model, load_tokenizer
from qrpo_core.train.trainer import QRPOTrainer

#: Called after every optimiser step with (step, steps in all, what was logged).
OnStep = Callable[[int, int, dict[str, float]], None]


def train_policy(
    examples: Sequence[Example],
    directory: Path,
    out: Path,
    *,
    model: ModelConfig,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    on_step: OnStep | None = None,
) -> list[dict[str, float]]:
    """Fine-tune the model of `directory` and save it, with its tokenizer, to `out` in `model.dtype`.

    Weights are trained in float32 (under bfloat16 autocast with precision bf16): a bfloat16 weight of
    0.1 has a grid of 5e-4, which would swallow most updates. Returns what was logged, one entry a step.
    """
    set_seed(training.seed)
    policy = load_model(directory, "float32")
    tokenizer = load_tokenizer(directory)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    history: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="qrpo-train-") as scratch:
        trainer = QRPOTrainer(
            policy,
            _arguments(training, scratch),
            examples,
            loss=objective.loss,
            pad_token_id=pad or 0,
            callbacks=[_History(history, on_step)],
        )
        trainer.remove_callback(PrinterCallback)  # progress is on_step's affair
        trainer.train()
    bad = [entry for entry in history if entry["loss"] != entry["loss"]]
    if bad:
        raise ObjectiveError(
            f"the loss is NaN at step {bad[0]['step']:.0f}", remedy="lower training.learning_rate"
        )
    transformers_logging.disable_progress_bar()  # the stage has a bar of its own
    policy.to(getattr(torch, model.dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return history


def _arguments(training: TrainingConfig, scratch: str) -> TrainingArguments:
    micro = min(training.micro_batch_size, training.batch_size)
    return TrainingArguments(
        output_dir=scratch,
        use_cpu=pick_device().type == "cpu",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // micro,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        warmup_steps=training.warmup_ratio,
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        # Where bfloat16 is not native the engine scores in float32, and so must the trainer.
        bf16=training.precision == "bf16" and native_bfloat16(pick_device()),
        activation_checkpointing=training.gradient_checkpointing,
        seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not skipped
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=pick_device().type == "cuda",
    )


class _History(TrainerCallback):  # type: ignore[misc]
    """Collects what the trainer logs and passes it on."""

    def __init__(self, history: list[dict[str, float]], on_step: OnStep | None) -> None:
        self.history = history
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the closing summary
        self.history.append({"step": float(state.global_step), **logs})
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps, self.history[-1])
