"""Train a policy on a training set and save it as a directory that `from_pretrained` loads.

The pipeline calls `train_policy`. One process trains here; launch.py starts several, each of which calls
`train_here`.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from qrpo_core.common.errors import DataError, ObjectiveError
from qrpo_core.common.hashing import digest_json, digest_pieces
from qrpo_core.config import ObjectiveConfig, TrainingConfig, cache_key_fields
from qrpo_core.data.collator import Example, Item, rows_of
from qrpo_core.models.loading import load_model
from qrpo_core.models.precision import careful_kernels, native_bfloat16, pick_device
from qrpo_core.models.source import policy_digest
from qrpo_core.store.checkpoint_store import CheckpointStore
from qrpo_core.training.checkpoints import Checkpoints, broadcast_from_first, checkpoint_to_resume
from qrpo_core.training.launch import exclusive_lock, launch, require_deepspeed
from qrpo_core.training.lora import add_adapters, restore_base
from qrpo_core.training.resumable import ResumableTrainer
from qrpo_core.training.saving import Trained, check_tokenizer, in_memory, load_trained, save, store_trained
from qrpo_core.training.sharding import load_shards
from qrpo_core.training.stopping import forget_stop
from qrpo_core.training.survival import Outcome, float32_logprobs, rows_to_compare
from qrpo_core.training.trackers import tracker

#: Seconds that processes wait for the first one, which digests, fetches and saves hundreds of gigabytes.
_PATIENCE = 4 * 3600

#: Called after every optimiser step with (step, number of steps, logged metrics).
OnStep = Callable[[int, int, dict[str, float]], None]


def train_policy(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    work: Path,
    stored: CheckpointStore | None = None,
    on_step: OnStep | None = None,
    run_name: str = "training",
) -> Outcome:
    """Fine-tune the model of `directory` and save it, with its tokenizer, to `out` in `training.save_dtype`.

    items : all examples or all pairs.
    work : a directory of this training alone. Training resumes from a checkpoint in it; the caller deletes it
        once the result is committed. checkpoints.py states its size.
    stored : where checkpoints go as well, and where a later one than those of `work` is looked for.
    training.temperature : of the policy's log-probs, and of the items' `ref_logprob`; None is 1.
    run_name : what the trackers of training.report_to call it.

    Returns the logged metrics, those before a kill included, and the comparison of saved and trained policy.
    On a CPU a resumed training has the losses of an uninterrupted one (CUDA adds some gradients in no fixed
    order). With training.lora_rank, `out` holds the merged weights and `out/adapter` the adapters.

    Every weight keeps its float32 value: a bfloat16 weight of 0.1 has a grid of 5e-4, which would swallow
    most updates. With bfloat16 matrices (training.weights_dtype) the optimiser has the bits below that grid.

    Raises DataError for no items, ObjectiveError if the loss or a weight is not finite, ConfigError for
    impossible LoRA targets, StoreError for a `work` of another training, QRPOError if a process fails,
    ModelError if the saved policy differs from the trained one (`work` keeps the training: see saving.py).
    """
    if not len(items):
        raise DataError("there are no training items", remedy="see which rows were filtered, and why")
    forget_stop(work)
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
            stored=stored,
            on_step=on_step,
            run_name=run_name,
        )
    finally:
        # A Trainer is in reference cycles, and the next engine needs its GPU memory.
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
    stored: CheckpointStore | None = None,
    on_step: OnStep | None = None,
    run_name: str = "training",
) -> Outcome:
    """`train_policy` in this process: the only one, or one of those that torchrun started.

    Every process returns the same history; the first one writes the policy and compares it.
    """
    # Before the model: DeepSpeed ZeRO-3 shards it while it is loaded.
    arguments = training_arguments(training, work, run_name)
    first = arguments.process_index == 0
    with exclusive_lock(work / "lock") if first else contextlib.nullcontext():
        facts = {
            "training": _training_digest(items, directory, objective, training),
            "layout": "deepspeed" if arguments.deepspeed else "tensors",
            "processes": arguments.world_size,
        }
        rows = rows_to_compare(items)
        done = broadcast_from_first(load_trained(work, facts) if first else None, arguments)
        if done is None:
            callbacks = [
                _StepReporter(on_step),
                Checkpoints(work, training.checkpoint_minutes, facts, stored),
                *(tracker(name, run_name) for name in training.report_to),
            ]
            start = broadcast_from_first(
                checkpoint_to_resume(work, facts, stored) if first else None, arguments
            )
            done = _train(
                items,
                rows,
                directory,
                arguments,
                facts,
                objective,
                training,
                work=work,
                start=start,
                callbacks=callbacks,
            )
        comparison = None
        if first:
            comparison = save(rows, done.logprobs, directory, out, training=training, work=work)
    return Outcome(done.history, comparison)


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
    start: Path | None,
    callbacks: list[TrainerCallback],
) -> Trained:
    """Train on from a checkpoint, or from the policy; the first process stores the result in `work`."""
    first = arguments.process_index == 0
    transformers_logging.disable_progress_bar()  # the stage shows its own
    set_seed(training.seed)
    if first:
        check_tokenizer(directory, rows)
    careful_kernels()  # as the engine that computed the reference log-probs
    policy = _loaded(directory, training, arguments)
    trainer = ResumableTrainer(
        policy,
        arguments,
        items,
        objective=objective,
        batch_size=training.batch_size,
        max_tokens=training.micro_batch_tokens,
        temperature=training.temperature or 1.0,
        activation_checkpointing=training.activation_checkpointing,
        weights_dtype=training.trained_dtype if arguments.bf16 else "float32",
        frozen_dtype=training.lora_base if arguments.bf16 else "float32",
        compile=training.compile,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # on_step reports progress
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.restore_weights()
    if training.lora_base != "float32":
        restore_base(policy, directory)
    weights = trainer.gathered_weights()
    logprobs = None
    if not arguments.deepspeed:
        model, temperature = in_memory(trainer.model_wrapped), training.temperature or 1.0
        logprobs = float32_logprobs(model, rows, arguments.device, temperature)
    history = _history(trainer.state.log_history)
    if first:
        del policy, trainer  # the optimiser's memory
        gc.collect()
        return store_trained(
            weights, rows, logprobs, history, directory=directory, training=training, work=work, facts=facts
        )
    return Trained(history, [])


def _loaded(directory: Path, training: TrainingConfig, arguments: TrainingArguments) -> Any:
    """The policy to train, with its adapters: whole, or this process's shards of it."""
    if training.parallel == "fsdp" and arguments.world_size > 1:
        return load_shards(directory, training, arguments.device)
    policy = load_model(directory, "float32")
    return policy if training.lora_rank is None else add_adapters(policy, training)


def training_arguments(training: TrainingConfig, work: Path, run_name: str) -> TrainingArguments:
    """The Trainer's settings. Joins the process group if torchrun started this process.

    deepspeed : the given JSON; ZeRO-3 needs stage3_gather_16bit_weights_on_model_save (which gathers weights
        of any precision). This project's tests have no GPU and do not run it.
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
        # Without native bfloat16 the engine computes log-probs in float32, and so must the trainer.
        bf16=training.precision == "bf16" and native_bfloat16(pick_device()),
        deepspeed=training.deepspeed,
        ddp_find_unused_parameters=False,
        ddp_timeout=_PATIENCE,
        seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must not be skipped
        save_strategy="no",  # callbacks decide; see checkpoints.py
        report_to=[],  # callbacks report; see trackers.py
        run_name=run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=pick_device().type == "cuda",
    )
    # The Trainer would spread one process over all GPUs by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _training_digest(
    items: Sequence[Item],
    directory: Path,
    objective: ObjectiveConfig,
    training: TrainingConfig,
) -> str:
    """A digest of everything that decides the losses: rows, pairs, starting policy and settings.

    A checkpoint with another digest is not resumed. training.save_dtype is not part of it.
    """

    def pieces() -> Iterator[bytes]:
        for item in items:
            for row in rows_of(item):
                sizes = np.array(
                    [len(rows_of(item)), len(row.prompt_token_ids), len(row.token_ids)], np.int64
                )
                yield sizes.tobytes()
                numbers = (row.target, row.beta, row.ref_logprob, row.reward, row.log_partition)
                yield np.array(numbers, np.float64).tobytes()
                yield np.asarray(row.prompt_token_ids, np.int64).tobytes()
                yield np.asarray(row.token_ids, np.int64).tobytes()

    return digest_json(
        [
            digest_pieces(pieces()),
            policy_digest(directory),
            cache_key_fields(objective),
            {name: value for name, value in cache_key_fields(training).items() if name != "save_dtype"},
            training.temperature or 1.0,
            training.trained_dtype,
        ]
    )


def _history(entries: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The entry of each step with sorted keys (as in a checkpoint), without the closing summary."""
    return [
        {name: float(entry[name]) for name in ("step", *sorted(entry.keys() - {"step"}))}
        for entry in entries
        if "loss" in entry
    ]


class _StepReporter(TrainerCallback):  # type: ignore[misc]
    """Calls `on_step` with the logged metrics, and ends a training whose loss is not finite."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the closing summary
        if not math.isfinite(logs["loss"]):
            updated = state.global_step > 1  # the loss of step 1 is the reference policy's own
            first = "scale rewards whose squares leave float32; else look at the model's weights"
            remedy = "lower training.learning_rate" if updated else first
            raise ObjectiveError(f"the loss is {logs['loss']} at step {state.global_step}", remedy=remedy)
        if self.on_step is not None and args.process_index == 0:
            self.on_step(
                state.global_step, state.max_steps, _history([{**logs, "step": state.global_step}])[0]
            )
