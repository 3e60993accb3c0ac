"""`QRPOTrainer`: every objective of the project on transformers' Trainer.

FSDP, DeepSpeed, LoRA, checkpoints, schedulers and trackers come with the Trainer; what is written here is
the loss, what is logged beside it, and how a step is read and cut into passes. The reference log-probs are
data, so one model is in memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from qrpo_core.data.batches import StepPlan
from qrpo_core.data.collator import Collator, Item, rows_of
from qrpo_core.errors import ConfigError
from qrpo_core.train.config import ObjectiveConfig
from qrpo_core.train.forward import CHECKED_TOKENS, causal_model, check_head, policy_logprobs
from qrpo_core.train.loader import ChosenHalves, Steps, check_items, step_loader
from qrpo_core.train.metrics import MetricSums, measures
from qrpo_core.train.objectives import make_objective

Batch = dict[str, torch.Tensor]


class QRPOTrainer(Trainer):  # type: ignore[misc]
    """Fits a policy to calibrated targets, or to a baseline's objective.

    Parameters
    ----------
    model : a causal language model of transformers, or a PEFT model around one.
    args : transformers.TrainingArguments. A copy is used, with gradient_accumulation_steps 1 (an item of
        the loader is a whole optimiser step) and logging_nan_inf_filter off (a NaN loss is to be seen).
    train_dataset : `Example`s for qrpo, `Pair`s for dpo, simpo and rebel, either for sft (of a pair the
        chosen half).
    objective : which objective, and its settings. qrpo: beta is each example's own.
    pad_token_id : fills batches; never in the loss.
    batch_size : items of an optimiser step over all processes. None: per_device_train_batch_size x
        gradient_accumulation_steps x processes.
    max_tokens : tokens of a pass of the model, padding included. Without it, or without batch_size, a pass
        holds at most per_device_train_batch_size items.
    temperature : the policy is softmax(logits / temperature), in the loss and in every metric. It must be
        the temperature at which reference log-probs were computed, and references drawn.
    kwargs : the Trainer's own: callbacks, optimizers, processing_class, ...

    The loss of an optimiser step is the mean over its items, however they are cut into passes and shared
    out among processes. Items are drawn in an order that args.seed and the epoch decide alone.

    Raises
    ------
    ConfigError : arguments that would change what is computed, or that are not supported (docs/trainer.md).
    DataError : an item of the wrong kind, or one that cannot be trained on; the message names it.
    ModelError : an output head that is not a plain linear layer, or logits scaled in an unknown way.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole step

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Sequence[Item],
        *,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        pad_token_id: int = 0,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        _check_arguments(args, kwargs)
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature {temperature} is refused", remedy="give a number above 0")
        self.temperature = temperature
        self.objective = make_objective(objective)
        items = ChosenHalves(train_dataset) if objective.kind == "sft" else train_dataset
        config = causal_model(model).config.get_text_config()
        checked = check_items(items, self.objective, getattr(config, "max_position_embeddings", None))
        own = copy.copy(args)
        own.gradient_accumulation_steps = 1
        own.logging_nan_inf_filter = False
        collator = Collator(pad_token_id)
        super().__init__(model=model, args=own, train_dataset=items, data_collator=collator, **kwargs)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ConfigError(
                "QRPOTrainer does not support tensor, context or sequence parallelism",
                remedy="use DDP, FSDP or DeepSpeed",
            )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ConfigError(
                f"fsdp on {args.device.type}, where accelerate shards nothing and every process would hold "
                "the whole model",
                remedy="leave fsdp out",
            )
        processes, rows = self.accelerator.num_processes, args.per_device_train_batch_size
        default = rows * args.gradient_accumulation_steps * processes
        self.plan = StepPlan(
            checked.widths,
            default if batch_size is None else batch_size,
            seed=args.seed,
            processes=processes,
            max_tokens=max_tokens,
            max_items=rows if batch_size is None or max_tokens is None else None,
        )
        self.model_accepts_loss_kwargs = False  # the model's own loss is never asked for
        self._has_reference = checked.has_reference
        self._metrics = MetricSums()
        self._keep_full_precision()
        self._check_head(items[0])

    def get_train_dataloader(self) -> DataLoader[list[Batch]]:
        """One item an optimiser step: this process's micro-batches."""
        steps = Steps(self.train_dataset, self.plan, self.data_collator, self.accelerator.process_index)
        return step_loader(steps, self.args)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The schedule, with a warm-up given as a share rounded down.

        transformers rounds it up, and the first step of a warm-up has learning rate 0: a training of one
        step would leave the policy as it is.
        """
        if self.args.warmup_steps < 1:
            self.args.warmup_steps = int(self.args.warmup_steps * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: Any, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of every micro-batch of a step; the sum of their losses.

        Processes exchange gradients once, with the last one.
        """
        self._metrics.start()
        state = self.accelerator.gradient_state
        # DeepSpeed keeps count by itself.
        each = self.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        for number, batch in enumerate(inputs, start=1):
            last = number == len(inputs)
            state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or each else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the items' losses over the items of the step, those of a whole collated batch by default.

        return_outputs : also give {"losses": [items], "logprobs": [rows]}, detached.
        """
        policy = policy_logprobs(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["completion_mask"],
            self.temperature,
        ).double()
        losses, weight = self.objective.losses(policy, inputs), inputs["weight"]
        count = inputs.get("items_in_step", weight.sum())
        # Gradients are averaged over processes, so a process's share counts as often as there are processes.
        loss = ((losses * weight).sum() * self.accelerator.num_processes / count).float()
        policy = policy.detach()
        found = measures(self.objective, policy, inputs, with_reference=self._has_reference)
        self._metrics.add(found, inputs)
        outputs = {"losses": losses.detach(), "logprobs": policy}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last entry (docs/metrics.md). Every process must call it."""
        if "loss" in logs and len(self._metrics):
            logs = logs | self._metrics.take(self.accelerator.gather)
        super().log(logs, start_time)

    def num_examples(self, dataloader: Any) -> int:
        """Items of an epoch."""
        return len(self.train_dataset)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Items of an optimiser step over all processes."""
        return self.plan.batch_size

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        """Estimate for the micro-batches of a step."""
        return sum(super(QRPOTrainer, self).floating_point_ops(batch) for batch in inputs)

    def _track_num_input_tokens(self, inputs: list[Batch]) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # The Trainer would cast float64 targets to DeepSpeed's dtype, often bfloat16.
        pinned = self.args.dataloader_pin_memory
        return {name: value.to(self.args.device, non_blocking=pinned) for name, value in inputs.items()}

    def _keep_full_precision(self) -> None:
        """Under FSDP2 accelerate rounds each module's output and the exchanged gradients to bfloat16.

        Log-probs leave by the output: a bfloat16 one near -10 has a grid of 0.06 nats.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )

    def _check_head(self, item: Item) -> None:
        """Compare log-probs with the model's own logits, where the weights are there to do so."""
        weight = causal_model(self.model).get_input_embeddings().weight
        if weight.is_meta or weight.numel() == 0:
            return  # to be filled from process 0, or in ZeRO-3's pieces
        row = rows_of(item)[0]
        tokens = [*row.prompt_token_ids, *row.token_ids][:CHECKED_TOKENS]
        check_head(self.model, torch.tensor([tokens], device=weight.device))


def _check_arguments(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Refuse what this trainer would ignore or what would change its numbers."""
    accumulation = args.accelerator_config.gradient_accumulation_kwargs or {}
    refused = [
        (args.n_gpu > 1, "one process with several GPUs", "start one process a GPU with torchrun"),
        (args.auto_find_batch_size, "auto_find_batch_size", "set max_tokens to what the memory holds"),
        (args.dataloader_drop_last, "dataloader_drop_last", "leave it off; no item is dropped"),
        (args.train_sampling_strategy != "random", "train_sampling_strategy", "leave it at 'random'"),
        (args.label_smoothing_factor != 0, "label_smoothing_factor", "leave it at 0"),
        (args.torch_compile, "torch_compile", "leave it off; the output head is replaced in every call"),
        ("num_steps" in accumulation, "accelerator_config's num_steps", "set batch_size"),
    ]
    own = ("eval_dataset", "data_collator", "compute_loss_func", "compute_metrics", "model_init")
    refused += [(kwargs.get(name) is not None, name, "leave it out") for name in own]
    for wrong, what, remedy in refused:
        if wrong:
            raise ConfigError(f"QRPOTrainer does not support {what}", remedy=remedy)
