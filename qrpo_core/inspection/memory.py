"""The memory that each stage of a run needs on a GPU, and the refusal of what cannot fit.

The figures are formulas (`models/memory.py`, `training/memory.py`). Training is counted with passes of
`training.micro_batch_tokens`, or of fewer where a step cannot have as many: a token has at least one byte, so
the bytes of the prompts are a bound. Sampling and log-probs are counted with one row, because they take as
many more as memory holds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.formatting import size
from qrpo_core.config import Experiment, RewardConfig, TrainingConfig
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.engines.kinds import kind_of
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.stage_plan import StagePlan
from qrpo_core.inspection.stage_work import as_drawn
from qrpo_core.maintenance.in_use import known_prompts
from qrpo_core.models.gguf_shape import gguf_shape
from qrpo_core.models.memory import ModelShape
from qrpo_core.pipeline import policies, prompts
from qrpo_core.pipeline.stage_names import TRAIN_POLICY, benchmark_in
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.rewards.model.source import locate
from qrpo_core.training.memory import inference_memory, training_memory

#: Tokens that a chat template may write around a turn.
_TURN_TOKENS = 64
#: Processes that a remedy may propose.
_PROCESSES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class StageMemory:
    """The memory of a stage on one GPU.

    parts : bytes by what needs them. limit : bytes that the stage may use; None without a GPU.
    certain : whether the formula is exact for this family of models. remedies : settings that need less.
    """

    stage: str
    parts: Mapping[str, int]
    limit: int | None
    certain: bool
    remedies: Sequence[str] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """False only where a formula that is exact says that the stage needs more than the GPU has."""
        return self.limit is None or not self.certain or self.total <= self.limit


def visible_gpu_memory() -> int | None:
    """Bytes of the smallest visible NVIDIA GPU; None without one. Does not initialise CUDA."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        found = [line.split(", ") for line in text.splitlines()]
        sizes = {index: (uuid, int(mebibytes) << 20) for index, uuid, mebibytes in found}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if given is None else [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    visible = [
        memory
        for index, (uuid, memory) in sizes.items()
        if wanted is None or any(gpu == index or uuid.startswith(gpu) for gpu in wanted)
    ]
    return min(visible, default=None)


def stage_memory(
    workspace: Workspace, stages: Iterable[StagePlan], gpu_memory: int | None
) -> list[StageMemory]:
    """The memory of the stages that load a model and have something to compute, one entry for like stages.

    gpu_memory : bytes of a GPU; None gives the figures of a CPU, without limits.
    """
    shape = policy_shape(workspace)
    found: dict[tuple[str, ...], StageMemory] = {}
    for stage in stages:
        if stage.missing:
            for each in _of_stage(workspace, stage.stage, shape, gpu_memory):
                key = (each.stage.split(" ")[0], *map(str, each.parts.values()))
                found.setdefault(key, each)
    return list(found.values())


def check_memory(workspace: Workspace, flow: str, *, pooled: bool = False, of: str = "") -> None:
    """Raise ConfigError if a stage of a flow cannot fit on this machine's GPUs; without GPUs nothing does.

    pooled : whether workers compute the rows, on their own GPUs; in `compare` those before training.
    of : what the line names before the stage, such as a variant.
    """
    gpu_memory = visible_gpu_memory()
    if gpu_memory is not None:
        stages = [each for each in plan(workspace) if _is_in(each.stage, flow, pooled)]
        refuse_too_large(stage_memory(workspace, stages, gpu_memory), of)


def _is_in(stage: str, flow: str, pooled: bool) -> bool:
    """Whether this machine computes a stage in a flow."""
    trains = ("align", "compare", "train", "round")
    if stage.startswith(TRAIN_POLICY):
        return flow in trains
    evaluates, later = re.search(r"held-out|benchmark|, after$", stage), ", round " in stage
    if pooled and not (flow == "compare" and (evaluates or later)):
        return False
    if evaluates:
        return flow in ("align", "compare", "evaluate")
    return flow in trains if later else flow in ("align", "compare", "precompute", "top_up", "top-up")


def refuse_too_large(memory: Iterable[StageMemory], of: str = "") -> None:
    """Raise ConfigError for the first stage that cannot fit on its GPU."""
    for each in memory:
        if not each.fits:
            raise ConfigError(
                f"{of}{': ' if of else ''}{each.stage} needs {size(each.total)} of memory on a GPU "
                f"({', '.join(f'{what} {size(count)}' for what, count in each.parts.items())}), and it has "
                f"{size(each.limit or 0)}",
                where="qrpo plan shows every stage",
                remedy=f"set {' or '.join(each.remedies)}" if each.remedies else "take a larger GPU",
            )


def policy_shape(workspace: Workspace) -> ModelShape | None:
    """The shape of the model; None where its layers have no formula, or a .gguf file cannot be read here."""
    source = policies.source_of(workspace)
    if not source.needs_conversion:
        return ModelShape.of_config(json.loads((source.settings / "config.json").read_text("utf-8")))
    made = workspace.artifacts.find(policies.recipe(workspace, source))
    if made is None:
        return gguf_shape(Path(source.location))
    return ModelShape.of_config(json.loads(workspace.artifacts.read(made, "policy/config.json")))


def _of_stage(
    workspace: Workspace, stage: str, shape: ModelShape | None, gpu_memory: int | None
) -> Iterator[StageMemory]:
    experiment = as_drawn(workspace.experiment, stage)
    kind = stage.split(" ")[0]
    if (name := benchmark_in(stage)) is not None:
        experiment = experiment.of_benchmark(name)
    if kind in ("annotate", "judge"):
        judge = experiment.evaluation.judges.get(stage.removeprefix("judge ").rpartition(" held-out, ")[0])
        yield from _rewards(stage, judge or experiment.reward, gpu_memory)
    elif shape is None:
        return
    elif kind == "sample":
        yield from _sampling(experiment, stage, shape, gpu_memory)
    elif "log-probs" in stage:
        yield _scoring(experiment, stage, shape, gpu_memory)
    elif stage.startswith("train "):
        yield _training(workspace, stage, shape, gpu_memory)


def _sampling(
    experiment: Experiment, stage: str, shape: ModelShape, gpu_memory: int | None
) -> Iterator[StageMemory]:
    """Weights and the cache of one sequence; engines take as many more sequences as memory holds."""
    kind = kind_of(experiment)
    if kind.loads_policy:
        item = 4 if experiment.model.dtype == "float32" or gpu_memory is None else 2
        limit = None if gpu_memory is None else int(gpu_memory * kind.memory_fraction(experiment))
        parts = kind.memory(experiment, shape, item)
        yield StageMemory(stage, parts, limit, shape.known, kind.memory_remedies)


def _scoring(experiment: Experiment, stage: str, shape: ModelShape, gpu_memory: int | None) -> StageMemory:
    """Log-probs in the arithmetic of training, those of a KL in float32; batches halve where memory ends."""
    training = experiment.training
    if stage.endswith(", after"):
        training = TrainingConfig(precision="fp32")
    row = experiment.sampling.max_new_tokens
    found = inference_memory(shape, training, row, gpu_memory=gpu_memory, bfloat16=gpu_memory is not None)
    remedies = ["training.lora_base bfloat16"] if training.lora_rank and training.precision == "bf16" else []
    return StageMemory(stage, found, gpu_memory, shape.known, remedies)


def _rewards(stage: str, reward: RewardConfig, gpu_memory: int | None) -> Iterator[StageMemory]:
    for config in _reward_models(reward):
        settings = locate(config).settings / "config.json"
        shape = ModelShape.of_config(json.loads(settings.read_text("utf-8")))
        if shape is not None:
            item = 4 if config.dtype == "float32" or gpu_memory is None else 2
            body = shape.parameters - (0 if shape.tied else shape.embedding_parameters)
            parts = {"weights": item * body}
            remedies = ["reward.model.dtype bfloat16"] if config.dtype == "float32" else []
            yield StageMemory(stage, parts, gpu_memory, shape.known, remedies)


def _reward_models(reward: RewardConfig) -> Iterator[ModelRewardConfig]:
    if reward.model is not None:
        yield reward.model
    for term in reward.terms:
        yield from _reward_models(term.reward)


def _training(workspace: Workspace, stage: str, shape: ModelShape, gpu_memory: int | None) -> StageMemory:
    experiment = workspace.experiment
    step = _step_tokens(workspace)

    def parts(training: TrainingConfig) -> dict[str, int]:
        own = step // training.processes
        tokens = min(training.micro_batch_tokens, own)
        found = training_memory(
            shape,
            training,
            tokens,
            several_passes=own > tokens,
            gpu_memory=gpu_memory,
            bfloat16=gpu_memory is not None,
        )
        names = {"activations": f"activations of {tokens:,} tokens"}
        return {names.get(what, what): count for what, count in vars(found).items() if count}

    found = parts(experiment.training)
    remedies: dict[str, str] = {}  # the first that fits, of each setting
    if gpu_memory is not None and sum(found.values()) > gpu_memory:
        for text, training in _smaller(experiment.training):
            if sum(parts(training).values()) <= gpu_memory:
                remedies.setdefault(text.split(" ")[0], text)
    certain = shape.known and experiment.training.deepspeed is None
    return StageMemory(stage, found, gpu_memory, certain, tuple(remedies.values()))


def _smaller(training: TrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Settings that need less memory than these, in words and in full."""

    def changed(**fields: Any) -> TrainingConfig:
        return training.model_copy(update=fields)

    again = {"activation_checkpointing": 1.0}
    yield "training.activation_checkpointing 1", changed(**again)
    for tokens in (4096, 2048, 1024):
        if tokens < training.micro_batch_tokens:
            yield f"training.micro_batch_tokens {tokens}", changed(micro_batch_tokens=tokens)
    if training.lora_rank is None:
        yield "training.lora_rank 16", changed(lora_rank=16)
        if training.precision == "bf16" and training.parallel == "ddp":
            small = {"lora_rank": 16, "lora_base": "bfloat16"} | again
            text = "training.lora_rank 16 with lora_base bfloat16 and activation_checkpointing 1"
            yield text, changed(**small)
    for processes in _PROCESSES:
        if processes > training.processes or training.parallel == "ddp":
            sharded = {"parallel": "fsdp", "processes": processes, "weights_dtype": "auto"} | again
            text = f"training.parallel fsdp with processes {processes} and activation_checkpointing 1"
            yield text, changed(**sharded)


def _step_tokens(workspace: Workspace) -> int:
    """The most tokens that an optimiser step may have, by the bytes of the prompts."""
    experiment = workspace.experiment
    if experiment.training_data.uses_data_set:
        return 1 << 40  # of a data set's own completions, not counted here
    _, tables = known_prompts(workspace)
    rows = experiment.training.batch_size * (2 if experiment.objective.pairwise else 1)
    return rows * (_longest(prompts.of_split(tables.prompts, "train")) + experiment.sampling.max_new_tokens)


def _longest(table: pa.Table) -> int:
    """Most tokens of a prompt: a byte of text each, and what the template adds to a turn."""
    lengths = (
        sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in turns)
        for turns in table["messages"].to_pylist()
    )
    return max(lengths, default=0)
