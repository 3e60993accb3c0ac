"""Train a policy on a training set and save it as a directory that `from_pretrained` loads.

`train_policy` is what the pipeline calls. One process trains here; several are started by launch.py, and each
of them comes back to `train_here`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from qrpo_core.config import ObjectiveConfig, TrainingConfig, recipe_fields
from qrpo_core.data.collator import Example, Item, rows_of
from qrpo_core.engines.numerics import native_bfloat16, pick_device
from qrpo_core.errors import DataError, ObjectiveError
from qrpo_core.ids import digest_json, digest_pieces
from qrpo_core.policy import load_model, load_tokenizer, policy_digest
from qrpo_core.train.checkpoints import Checkpoints, from_first, newest
from qrpo_core.train.launch import alone, launch, require_deepspeed
from qrpo_core.train.lora import add_adapters
from qrpo_core.train.saving import Trained, check_tokenizer, in_memory, keep, kept, save
from qrpo_core.train.survival import Outcome, chosen_rows, float32_logprobs
from qrpo_core.train.trainer import QRPOTrainer

#: Called after every optimiser step with (step, steps in all, what was logged).
OnStep = Callable[[int, int, dict[str, float]], None]


def train_policy(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    work: Path,
    on_step: OnStep | None = None,
) -> Outcome:
    """Fine-tune the model of `directory` and save it, with its tokenizer, to `out` in `training.save_dtype`.

    items : what is trained on, all examples or all pairs.
    work : a directory of this training alone, which outlives a kill: when it holds a checkpoint, training
        goes on from there. Whoever calls deletes it once the result is committed. Its size: checkpoints.py.

    training.temperature : of the policy's log-probs, and of the items' `ref_logprob`; None is 1.

    Returns what was logged and how much of the training is in what was saved. The log includes what came
    before a kill; on a CPU the losses are the same whether there was one or not (CUDA adds some gradients up
    in no fixed order). With training.lora_rank, `out` holds the merged weights and `out/adapter` the
    adapters.

    Weights are trained in float32 (under bfloat16 autocast with precision bf16): a bfloat16 weight of
    0.1 has a grid of 5e-4, which would swallow most updates.

    Raises DataError for no items, ObjectiveError when the loss or a weight is not finite, ConfigError for
    LoRA that cannot be had, StoreError for a `work` of another training, QRPOError when a process fails,
    ModelError where what was saved is not what was trained (`work` keeps the training: see saving.py).
    """
    if not len(items):
        raise DataError("there is nothing to train on", remedy="see which rows were filtered, and why")
    require_deepspeed(training)
    train = launch if training.processes > 1 or training.deepspeed is not None else train_here
    try:
        return train(
            items,
            directory,
            out,
            objective=objective,
            training=training,
            work=work,
            on_step=on_step,
        )
    finally:
        # A Trainer is in reference cycles, and its GPU memory is wanted by the engine that comes next.
        gc.collect()
        torch.cuda.empty_cache()


def train_here(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    work: Path,
    on_step: OnStep | None = None,
) -> Outcome:
    """`train_policy` in this process: the only one, or one of those that torchrun started.

    Every process gives the same history; the first one writes the policy and has compared it.
    """
    # Before the model: DeepSpeed ZeRO-3 shards it while it is loaded.
    arguments = training_arguments(training, work)
    first = arguments.process_index == 0
    with alone(work / "lock") if first else contextlib.nullcontext():
        facts = {
            "training": _identity(items, directory, objective, training),
            "layout": "deepspeed" if arguments.deepspeed else "fsdp" if arguments.fsdp else "whole",
            "processes": arguments.world_size,
        }
        rows = chosen_rows(items)
        done = from_first(kept(work, facts) if first else None, arguments)
        if done is None:
            done = _train(
                items, rows, directory, arguments, facts, objective, training, work=work, on_step=on_step
            )
        scored = None
        if first:
            scored = save(rows, done.logprobs, directory, out, training=training, work=work)
    return Outcome(done.history, scored)


def _train(
    items: Sequence[Item],
    rows: Sequence[Example],
    directory: Path,
    arguments: TrainingArguments,
    facts: dict[str, Any],
    objective: ObjectiveConfig,
    training: TrainingConfig,
    *,
    work: Path,
    on_step: OnStep | None,
) -> Trained:
    """Train; what comes out is left in `work` by the first process (`saving.keep`)."""
    first = arguments.process_index == 0
    checkpoint = from_first(newest(work, facts) if first else None, arguments)
    transformers_logging.disable_progress_bar()  # the stage has a bar of its own
    set_seed(training.seed)
    if first:
        check_tokenizer(directory, rows)
    policy = load_model(directory, "float32")
    if training.lora_rank is not None:
        policy = add_adapters(policy, training)
    if arguments.fsdp and arguments.bf16:
        # accelerate does this to a model, but not to a sharded one; see `_shard_as_asked`.
        policy.forward = torch.autocast(arguments.device.type, torch.bfloat16)(policy.forward)
    tokenizer = load_tokenizer(directory)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = QRPOTrainer(
        policy,
        arguments,
        items,
        objective=objective,
        pad_token_id=pad or 0,
        batch_size=training.batch_size,
        max_tokens=training.micro_batch_tokens,
        temperature=training.temperature or 1.0,
        callbacks=[_Watch(on_step), Checkpoints(work, training.checkpoint_minutes, facts)],
    )
    trainer.remove_callback(PrinterCallback)  # progress is on_step's affair
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered from every process
    logprobs = None
    if not arguments.deepspeed:
        model, temperature = in_memory(trainer.model_wrapped), training.temperature or 1.0
        logprobs = float32_logprobs(model, rows, arguments.device, temperature)
    history = _history(trainer.state.log_history)
    if first:
        del policy, trainer  # the optimiser's memory
        gc.collect()
        return keep(
            weights, rows, logprobs, history, directory=directory, training=training, work=work, facts=facts
        )
    return Trained(history, [])


def training_arguments(training: TrainingConfig, work: Path) -> TrainingArguments:
    """The Trainer's settings; joins the process group where torchrun has started this process.

    fsdp : FSDP2, one shard a decoder layer. Each process loads the whole model into host memory first.
    deepspeed : the given JSON; ZeRO-3 needs stage3_gather_16bit_weights_on_model_save (which gathers weights
        of any precision). Never run by this project's tests, which have no GPU.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=pick_device().type == "cpu",
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=1,  # the trainer makes its batches by tokens
        warmup_steps=training.warmup_ratio,
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        # Where bfloat16 is not native the engine scores in float32, and so must the trainer.
        bf16=training.precision == "bf16" and native_bfloat16(pick_device()),
        activation_checkpointing=training.gradient_checkpointing,
        deepspeed=training.deepspeed,
        ddp_find_unused_parameters=False,
        seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not skipped
        save_strategy="no",  # callbacks decide; see checkpoints.py
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=pick_device().type == "cuda",
        **_sharding(training),
    )
    if arguments.fsdp:
        _shard_as_asked(arguments)
    # The Trainer would spread one process over all GPUs by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _sharding(training: TrainingConfig) -> dict[str, Any]:
    """FSDP2's settings, for several processes that ask for it; each writes and reads its own shards."""
    if training.parallel != "fsdp" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


def _shard_as_asked(arguments: TrainingArguments) -> None:
    """Two things that accelerate would do otherwise under FSDP.

    Its mixed precision rounds what leaves the model to bfloat16, where a log-prob of -400 has a grid of 2
    nats, and what the processes exchange: off; `train_here` has autocast do what it does without shards.
    (For a like reason transformers checkpoints the activations: accelerate would draw other dropout masks
    the second time.) On the CPU it would train whole copies in silence: told that this is a GPU, it shards.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    if arguments.use_cpu:
        state = arguments.distributed_state
        state.distributed_type = type(state.distributed_type).MULTI_GPU


def _identity(
    items: Sequence[Item],
    directory: Path,
    objective: ObjectiveConfig,
    training: TrainingConfig,
) -> str:
    """A digest of all that decides the losses, so that no checkpoint of another training is gone on from:
    every token and number of every row, which rows are pairs, the starting policy, and the settings.

    In which precision the policy is saved makes no other training.
    """

    def pieces() -> Iterator[bytes]:
        for item in items:
            for row in rows_of(item):
                sizes = np.array(
                    [len(rows_of(item)), len(row.prompt_token_ids), len(row.token_ids)], np.int64
                )
                yield sizes.tobytes()
                yield np.array([row.target, row.beta, row.ref_logprob, row.reward], np.float64).tobytes()
                yield np.asarray(row.prompt_token_ids, np.int64).tobytes()
                yield np.asarray(row.token_ids, np.int64).tobytes()

    return digest_json(
        [
            digest_pieces(pieces()),
            policy_digest(directory),
            recipe_fields(objective),
            {name: value for name, value in recipe_fields(training).items() if name != "save_dtype"},
            training.temperature or 1.0,
        ]
    )


def _history(entries: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The entry of each step, keys in order (a checkpoint sorts them); the closing summary is left out."""
    return [
        {name: float(entry[name]) for name in ("step", *sorted(entry.keys() - {"step"}))}
        for entry in entries
        if "loss" in entry
    ]


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Passes on what is logged after a step, and ends a training whose loss is no number."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the closing summary
        if not math.isfinite(logs["loss"]):
            raise ObjectiveError(
                f"the loss is {logs['loss']} at step {state.global_step}",
                remedy="lower training.learning_rate",
            )
        if self.on_step is not None and args.process_index == 0:
            self.on_step(
                state.global_step, state.max_steps, _history([{**logs, "step": state.global_step}])[0]
            )
