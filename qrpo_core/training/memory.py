"""Bytes of a training step on one device, by formula; `models/memory.py` says what is counted.

A step has its peak in one of three moments. When the backward pass begins, all activations are there and the
head makes its gradient. Later a layer whose activations are computed again has all of them beside those that
were kept. At the end all gradients are there, and the embedding makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from qrpo_core.config import TrainingConfig
from qrpo_core.models.memory import ModelShape
from qrpo_core.training.memory_facts import frozen_matrix, trained_matrix

if TYPE_CHECKING:
    from qrpo_core.objective.chunked_head import Gradients


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a step.

    weights : of the model, in the dtype in which it computes. optimiser : moments, and what bfloat16 weights
        lack. copies : bfloat16 copies of float32 weights, which autocast makes and the backward pass needs.
    head : projecting the vocabulary, and the gradient of the head. sharing : what parallel fsdp gathers, and
        the buckets in which ddp exchanges gradients.
    """

    weights: int
    gradients: int
    optimiser: int
    copies: int
    activations: int
    head: int
    sharing: int

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


def training_memory(
    shape: ModelShape,
    training: TrainingConfig,
    tokens: int,
    *,
    label_tokens: int | None = None,
    several_passes: bool = True,
    gpu_memory: int | None = None,
    bfloat16: bool = True,
) -> StepMemory:
    """The bytes of a step on one device.

    tokens : of a pass, prompts and completions; there is no padding. label_tokens : completion tokens among
        them, whose vocabulary is projected; None takes all.
    several_passes : whether a step has more than one pass, so that gradients exist before the last.
    gpu_memory : bytes of the GPU, which decide the chunks of the projection; None is a CPU.
    bfloat16 : whether the device multiplies bfloat16; without, `precision: bf16` computes in float32.
    """
    mixed, rank = training.precision == "bf16" and bfloat16, training.lora_rank
    trained, frozen = trained_matrix(training), frozen_matrix(training)
    own = shape.parameters if rank is None else shape.adapter_parameters(rank)
    base = 0 if rank is None else shape.parameters
    shards = training.processes if training.parallel == "fsdp" else 1
    again = int(shape.layers * training.activation_checkpointing)  # layers whose activations are not kept
    layer = shape.layer_activations(mixed=mixed, lora_rank=rank, compiled=_compiled(training, gpu_memory))
    kept = shape.layers - again
    inputs = tokens * 4 * shape.width  # a layer's input, in float32
    cast = (frozen if rank is not None else trained).cast if mixed else 0
    embedding = trained.gradient * shape.embedding_parameters if rank is None else 0

    def moment(layers: int, head: int, *, others: int = again, whole_gradients: bool) -> StepMemory:
        """layers : whose activations and casts are there. others : of which the input is there."""
        return StepMemory(
            weights=(trained.weight * own + frozen.weight * base) // shards,
            gradients=trained.gradient * own // shards if whole_gradients else 0,
            optimiser=(trained.moments + trained.low_bits) * own // shards,
            copies=cast * shape.layer_parameters * layers,
            activations=tokens * layer * layers + inputs * (others + 2),
            head=head,
            sharing=_sharing(shape, training, own),
        )

    labels = tokens if label_tokens is None else label_tokens
    head = _head(
        shape,
        labels,
        weight=trained.weight if rank is None else frozen.weight,
        mixed=mixed,
        gpu_memory=gpu_memory,
        gradients="all" if rank is None else "states",
    )
    begin = moment(kept, head, whole_gradients=several_passes)
    # Of a tied embedding autograd keeps the head's gradient, makes the embedding's, and adds both in a third.
    last = embedding * (2 * shape.tied + several_passes)
    end = moment(0, last, others=0, whole_gradients=True)
    moments = [begin, end]
    if again:  # two more [tokens, width]: the gradients of its output
        in_layer = moment(kept + 1, embedding + 2 * inputs, whole_gradients=several_passes)
        moments.append(in_layer)
    return max(moments, key=lambda each: each.total)


def _compiled(training: TrainingConfig, gpu_memory: int | None) -> bool:
    """Whether layers are compiled; `auto` is taken to succeed on a GPU."""
    sharded = training.parallel == "fsdp" or training.deepspeed is not None
    return training.compile == "always" or (
        training.compile == "auto" and gpu_memory is not None and not sharded
    )


def _sharing(shape: ModelShape, training: TrainingConfig, own: int) -> int:
    """Bytes for exchanging weights and gradients between processes."""
    if training.processes == 1:
        return 0
    if training.parallel == "ddp":
        return trained_matrix(training).gradient * own
    outside = shape.parameters - shape.layers * shape.layer_parameters
    # Two layers, the next one while the first computes, and embedding and head all the time; with gradients.
    return 8 * (2 * shape.layer_parameters + outside)


def _head(
    shape: ModelShape,
    labels: int,
    *,
    weight: int,
    mixed: bool,
    gpu_memory: int | None,
    gradients: Gradients,
) -> int:
    """Bytes of the projection, its states included. weight : bytes of a number of the head's weight."""
    import torch

    from qrpo_core.objective.chunked_head import CPU_CHUNK_BYTES, GPU_CHUNK_SHARE, head_bytes

    return 4 * shape.width * labels + head_bytes(
        labels,
        shape.vocabulary,
        shape.width,
        weights=torch.float32 if weight == 4 else torch.bfloat16,
        products=torch.bfloat16 if mixed else torch.float32,
        gradients=gradients,
        chunk=CPU_CHUNK_BYTES if gpu_memory is None else gpu_memory // GPU_CHUNK_SHARE,
        rounded=mixed and gpu_memory is None,
    )


def inference_memory(
    shape: ModelShape,
    training: TrainingConfig,
    tokens: int,
    *,
    label_tokens: int | None = None,
    gpu_memory: int | None = None,
    bfloat16: bool = True,
) -> dict[str, int]:
    """The bytes of log-probs without gradients, in the arithmetic of a training, by what needs them.

    tokens : of a pass; a smaller pass runs where this one does not fit. Others as in `training_memory`.
    """
    mixed = training.precision == "bf16" and bfloat16
    labels = tokens if label_tokens is None else label_tokens
    weight = 2 if training.arithmetic == "bf16-weights" and bfloat16 else 4
    layers = tokens * shape.inference_activations(mixed=mixed)
    head = 4 * shape.width * tokens + _head(
        shape, labels, weight=weight, mixed=mixed, gpu_memory=gpu_memory, gradients="none"
    )
    larger = {"activations": layers} if layers > head else {"head": head}
    return {"weights": weight * shape.parameters} | larger
