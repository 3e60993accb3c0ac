"""`QRPOTrainer`: every objective of the project on transformers' Trainer.

FSDP, DeepSpeed, LoRA, checkpoints, schedulers and trackers come with the Trainer. This module adds the loss,
its metrics, and the division of a step into microbatches. Reference log-probs are data, so one model is in
memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.objective import ObjectiveConfig
from qrpo_core.config.training import HIDDEN_MOVEMENTS
from qrpo_core.data.collator import Collator, ExampleColumns, Item, rows_of
from qrpo_core.data.step_plan import StepPlan
from qrpo_core.models.forward import CHECKED_TOKENS, causal_model, check_head, policy_logprobs
from qrpo_core.models.packed_attention import use_packed_attention
from qrpo_core.models.packing_check import check_packing
from qrpo_core.models.split_weights import round_matrices
from qrpo_core.objective_kinds import make_objective
from qrpo_core.training.deferred_log import DeferredLogTrainer
from qrpo_core.training.layers import compile_layers, recompute_activations, uncompile_layers
from qrpo_core.training.loader import ChosenExamples, StepDataset, check_items, step_loader
from qrpo_core.training.master_weights import MasterAdamW
from qrpo_core.training.metrics import item_metrics
from qrpo_core.training.sharding import give_up_gathered, no_exchange

Batch = dict[str, Any]

_logger = logging.getLogger("qrpo.train")


class QRPOTrainer(DeferredLogTrainer):
    """Fits a policy to calibrated targets, or to a baseline's objective.

    Parameters
    ----------
    model : a causal language model of transformers, or a PEFT model around one.
    args : transformers.TrainingArguments. A copy is used, with gradient_accumulation_steps 1 (the loader
        yields whole optimiser steps) and logging_nan_inf_filter off (a NaN loss must show).
    train_dataset : `Pair`s for dpo, simpo and rebel, either kind for sft (of a pair the chosen half),
        `Example`s for the others; or a Hugging Face data set with the fields of `Example` as columns, such as
        the training set of `qrpo export`. Of text: `qrpo_core.pipeline.text_items.text_items`.
    objective : which objective, and its settings. With `Example`s of targets, beta is each example's own.
    batch_size : items of an optimiser step over all processes. None: per_device_train_batch_size x
        gradient_accumulation_steps x processes.
    max_tokens : tokens of a microbatch, in which equal prompts count once. Without it, or without batch_size,
        a microbatch holds at most per_device_train_batch_size items.
    temperature : the policy is softmax(logits / temperature), in the loss and in every metric. Reference
        log-probs and reference completions must have the same temperature.
    activation_checkpointing : share of the decoder layers whose activations are computed again backward.
        args.activation_checkpointing computes those of all layers again.
    weights_dtype : "bfloat16" trains bfloat16 matrices with AdamW on their float32 values, which
        `restore_weights` puts back after training. Needs args.bf16, as frozen_dtype does. "float32" with
        args.bf16 is a warning where all weights are trained: autocast hides small movements from the loss.
    frozen_dtype : "bfloat16" rounds matrices that are not trained, under adapters.
    compile : "always" compiles the decoder layers, "auto" on a GPU where a trial works. args.torch_compile is
        refused: the output head is replaced in every call.
    kwargs : the Trainer's own: callbacks, optimizers, processing_class, ...

    The loss of an optimiser step is the mean over its items, in any division into microbatches and processes.
    args.seed and the epoch alone decide the order of the items.

    Raises
    ------
    ConfigError : unsupported arguments; docs/how-to/train-from-python.md lists them.
    DataError : an item of the wrong kind, or an item that training cannot use; the message names it.
    ModelError : an output head that is not a plain linear layer, or an unknown scale of the logits.
    """

    _low_bits: dict[torch.nn.Parameter, torch.Tensor]
    loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole step

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Sequence[Item] | Any,
        *,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        batch_size: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        activation_checkpointing: float = 0.0,
        weights_dtype: str = "float32",
        frozen_dtype: str = "float32",
        compile: str = "never",
        **kwargs: Any,
    ) -> None:
        sharded = bool(args.fsdp or args.deepspeed) or isinstance(model, FSDPModule)
        rounded = "bfloat16" in (weights_dtype, frozen_dtype)
        _check_arguments(args, kwargs, rounded=rounded, sharded=sharded, compiled=compile == "always")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature {temperature} is refused", remedy="give a number above 0")
        self.temperature = temperature
        self.objective = make_objective(objective)
        if hasattr(train_dataset, "column_names"):
            train_dataset = ExampleColumns.of_data_set(train_dataset)
        items = ChosenExamples(train_dataset) if self.objective.items == "chosen" else train_dataset
        config = causal_model(model).config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        sizes, self._has_reference = check_items(items, self.objective, longest)
        own = copy.copy(args)
        own.gradient_accumulation_steps = 1
        own.logging_nan_inf_filter = False
        collator = Collator()
        super().__init__(model=model, args=own, train_dataset=items, data_collator=collator, **kwargs)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ConfigError(
                "QRPOTrainer does not support tensor, context or sequence parallelism",
                remedy="use DDP, FSDP or DeepSpeed",
            )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ConfigError(
                f"fsdp on {args.device.type}, where accelerate shards nothing: every process would hold "
                "the whole model",
                remedy="leave fsdp out",
            )
        processes, rows = self.accelerator.num_processes, args.per_device_train_batch_size
        default = rows * args.gradient_accumulation_steps * processes
        self.plan = StepPlan(
            sizes,
            default if batch_size is None else batch_size,
            seed=args.seed,
            processes=processes,
            max_tokens=max_tokens,
            max_items=rows if batch_size is None or max_tokens is None else None,
        )
        self.model_accepts_loss_kwargs = False
        self._keep_full_precision()
        self._check_model(items[0])
        self._prepare_model(activation_checkpointing, weights_dtype, frozen_dtype, compile)

    def get_train_dataloader(self) -> DataLoader[list[Batch]]:
        """One item an optimiser step: this process's microbatches."""
        steps = StepDataset(self.train_dataset, self.plan, self.data_collator, self.accelerator.process_index)
        return step_loader(steps, self.args)

    def training_step(
        self, model: Any, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a step: the sum over its microbatches, after forward and backward of each.

        Processes exchange gradients once, in the last microbatch.
        """
        self._metrics.start()
        state = self.accelerator.gradient_state
        # DeepSpeed counts microbatches itself.
        each = self.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        for number, batch in enumerate(inputs, start=1):
            last = number == len(inputs)
            state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or each else no_exchange(self.accelerator, model):
                losses.append(super().training_step(model, batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The items' losses, summed and divided by the items of the step (by default those of the batch).

        return_outputs : also return {"losses": [items], "logprobs": [rows]}, detached.
        """
        policy = policy_logprobs(model, inputs["packed"], self.temperature)
        losses, weight = self.objective.losses(policy, inputs), inputs["weight"]
        count = inputs.get("items_in_step", weight.sum())
        # Gradients are averaged over processes, so a process's share counts as often as there are processes.
        loss = ((losses * weight).sum() * self.accelerator.num_processes / count).float()
        policy = policy.detach()
        found = item_metrics(self.objective, policy, inputs, with_reference=self._has_reference)
        self._metrics.add(found, inputs)
        outputs = {"losses": losses.detach(), "logprobs": policy}
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser; for bfloat16 weights AdamW on their float32 values."""
        if self._low_bits and self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if kind is not torch.optim.AdamW:
                raise ConfigError(
                    f"weights_dtype 'bfloat16' with optim {self.args.optim}", remedy="leave optim at AdamW"
                )
            settings = {name: value for name, value in settings.items() if name != "fused"}
            self.optimizer_cls_and_kwargs = MasterAdamW, settings | {"low_bits": self._low_bits}
            self._low_bits = {}
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def restore_weights(self) -> None:
        """Give bfloat16 matrices their trained float32 values, and free the optimiser's memory.

        Compiled layers run uncompiled again.
        Call it after `train`, before the model is used or saved; it ends the training.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MasterAdamW):
            optimizer.restore()
        uncompile_layers(self.model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's scheduler; a single step has no warm-up, which would make its learning rate 0."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        scheduler: torch.optim.lr_scheduler.LRScheduler = super().create_scheduler(
            num_training_steps, optimizer
        )
        return scheduler

    def num_examples(self, dataloader: Any) -> int:
        """Items of an epoch."""
        return len(self.train_dataset)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Items of an optimiser step over all processes."""
        return self.plan.batch_size

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        """Estimate for the microbatches of a step."""
        tokens = sum(int(batch["packed"].input_ids.numel()) for batch in inputs)
        return 6 * self._layer_parameters * tokens

    @functools.cached_property
    def _layer_parameters(self) -> int:
        inner = causal_model(self.model)
        return int(inner.num_parameters(exclude_embeddings=True)) if hasattr(inner, "num_parameters") else 0

    def _track_num_input_tokens(self, inputs: list[Batch]) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(_tokens(batch))

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # The Trainer casts float64 targets to DeepSpeed's dtype, often bfloat16.
        pinned = self.args.dataloader_pin_memory
        return {name: value.to(self.args.device, non_blocking=pinned) for name, value in inputs.items()}

    def _prepare_model(self, recomputed: float, weights_dtype: str, frozen_dtype: str, compiled: str) -> None:
        """What the arguments of the same names in `__init__` say."""
        if recomputed:
            recompute_activations(self.model, recomputed)
        self._low_bits = round_matrices(self.model, trained=True) if weights_dtype == "bfloat16" else {}
        whole = all(weight.requires_grad for weight in self.model.parameters())
        if self.args.bf16 and whole and weights_dtype == "float32" and self.args.process_index == 0:
            _logger.warning("%s.", HIDDEN_MOVEMENTS)
        if frozen_dtype == "bfloat16":
            round_matrices(self.model, trained=False)
        compile_layers(self.model, compiled, self.args.device)

    def _keep_full_precision(self) -> None:
        """Keep outputs and exchanged gradients in float32 under FSDP2; accelerate rounds them to bfloat16.

        Log-probs are such outputs: a bfloat16 one near -10 has a grid of 0.06 nats.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )

    def _check_model(self, item: Item) -> None:
        """Compare log-probs with the model's own logits, and packed with separate rows, if it has weights."""
        inner = causal_model(self.model)
        use_packed_attention(inner)
        weight = inner.get_input_embeddings().weight
        if weight.is_meta or weight.numel() == 0:
            return  # process 0 fills them later, or ZeRO-3 holds them in pieces
        row = rows_of(item)[0]
        tokens = [*row.prompt_token_ids, *row.token_ids][:CHECKED_TOKENS]
        check_head(self.model, torch.tensor([tokens], device=weight.device))
        check_packing(self.model, row.prompt_token_ids, row.token_ids)
        give_up_gathered(self.model)


def _tokens(batch: Batch) -> dict[str, torch.Tensor]:
    """What the Trainer counts: the tokens of a packed row, none of which is padding."""
    ids = batch["packed"].input_ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_arguments(
    args: TrainingArguments, kwargs: dict[str, Any], *, rounded: bool, sharded: bool, compiled: bool
) -> None:
    """Raise ConfigError for arguments that this trainer ignores, or that would change its numbers."""
    accumulation = args.accelerator_config.gradient_accumulation_kwargs or {}
    refused = [
        (args.n_gpu > 1, "one process with several GPUs", "start one process a GPU with torchrun"),
        (args.auto_find_batch_size, "auto_find_batch_size", "set max_tokens to what the memory holds"),
        (args.dataloader_drop_last, "dataloader_drop_last", "leave it off; no item is dropped"),
        (args.train_sampling_strategy != "random", "train_sampling_strategy", "leave it at 'random'"),
        (args.label_smoothing_factor != 0, "label_smoothing_factor", "leave it at 0"),
        (args.torch_compile, "torch_compile", "give QRPOTrainer compile='always' (training.compile: always)"),
        ("num_steps" in accumulation, "accelerator_config's num_steps", "set batch_size"),
    ]
    refused += [
        (rounded and not args.bf16, "bfloat16 weights without autocast", "set bf16=True"),
        (compiled and sharded, "compiled layers in shards", "set compile='auto', or leave shards out"),
        (
            rounded and sharded,
            "bfloat16 weights in shards",
            "leave weights in float32, or fsdp and deepspeed out",
        ),
    ]
    own = ("eval_dataset", "data_collator", "compute_loss_func", "compute_metrics", "model_init")
    refused += [(kwargs.get(name) is not None, name, "leave it out") for name in own]
    for wrong, what, remedy in refused:
        if wrong:
            raise ConfigError(f"QRPOTrainer does not support {what}", remedy=remedy)
