"""What training does to a model's layers: compute their activations again, and compile them."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qrpo_core.common.errors import ConfigError
from qrpo_core.objective.head_kernels import compile_head, uncompile_head

_logger = logging.getLogger("qrpo.train")


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a transformers model, wrapped or not, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations(model: Any, share: float) -> None:
    """Compute the activations of a share of the decoder layers again in the backward pass.

    share : 0 to 1 of the layers, spread evenly; 0.5 takes every second one. Dropout draws its masks again.

    Raises ConfigError if a share is asked of a model without such layers.
    """
    layers = decoder_layers(model)
    if share and not layers:
        raise ConfigError(
            f"{type(model).__name__} has no decoder layers whose activations can be computed again",
            where="training.activation_checkpointing",
            remedy="set it to 0",
        )
    again = functools.partial(checkpoint, use_reentrant=False)
    for place, layer in enumerate(layers):
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = math.floor((place + 1) * share) > math.floor(place * share)


def compile_layers(model: Any, choice: str, device: torch.device) -> None:
    """Compile every decoder layer in place, for microbatches of any length; `uncompile_layers` undoes it.

    choice : "always", "never", or "auto": on a GPU where a trial works (it needs Triton and a C compiler),
        but not layers in shards.

    Layers are compiled, not the model: its output head is replaced in every call, and its kernels are
    compiled instead (`compile_head`).
    """
    if choice == "never" or (choice == "auto" and device.type != "cuda"):
        return
    if choice == "auto" and (problem := _trial(device)):
        _logger.warning("training.compile auto: layers are not compiled, because a trial failed: %s", problem)
        return
    compile_head()
    if choice == "auto" and any(isinstance(layer, FSDPModule) for layer in decoder_layers(model)):
        return
    import torch._dynamo
    import torch._inductor.config

    # DDP would cut graphs at its buckets, which are larger than a layer; recomputed activations forbid that.
    torch._dynamo.config.optimize_ddp = False
    torch._inductor.config.fallback_random = True  # the dropout masks of layers that are not compiled
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def uncompile_layers(model: Any) -> None:
    """Run the decoder layers and the output head as they are written again."""
    uncompile_head()
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None


def _trial(device: torch.device) -> str:
    """Why a small function cannot be compiled for a device; empty if it can."""
    try:
        torch.compile(lambda values: values.sin() + 1, dynamic=True)(torch.zeros(4, device=device))
    except Exception as error:  # compilers fail in many ways, and none may end a training
        return " ".join([type(error).__name__, *str(error).split()])[:200]
    return ""
