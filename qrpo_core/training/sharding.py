"""FSDP2: a policy of which each process holds, and reads from the disk, its own shard alone.

A model is built without memory for its parameters, divided, and filled from the slices of its safetensors
files. So no process has a whole weight matrix in its memory before the first forward pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qrpo_core.common.errors import ModelError
from qrpo_core.config import TrainingConfig
from qrpo_core.models.forward import causal_model
from qrpo_core.models.loading import load_model
from qrpo_core.training.layers import decoder_layers
from qrpo_core.training.lora import add_adapters

_logger = logging.getLogger("qrpo.train")


def load_shards(directory: Path, training: TrainingConfig, device: torch.device) -> Any:
    """The policy of a directory in float32, with the adapters of `training`, divided among all processes.

    A decoder layer is one unit: its weights are gathered for its passes and given up after them. Every
    process of the group must call this. The weights of an output head stay gathered during a pass.

    Raises ModelError if weights are missing or have another shape.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    places = _places(directory)
    model = _without_weights(directory)
    empty = all(name in places for name, _ in model.named_parameters())
    if not empty:
        _logger.warning(
            "%s stores its weights under other names than the model has: each process loads all of them",
            directory,
        )
        model = load_model(directory, "float32")
    if training.lora_rank is not None:
        model = add_adapters(_on_stubs(model) if empty else model, training)
        if empty:
            _to_meta(model)
    divide(model, mesh)
    if empty:
        _fill(model, places, prefix="base_model.model." if training.lora_rank is not None else "")
    return model


def divide(model: Any, mesh: DeviceMesh) -> None:
    """Divide a model's parameters in place, and tell the Trainer that it must not."""
    layers = decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None and (head is None or embedding.weight is not head.weight):
        layers.append(embedding)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # So says a model that transformers itself has divided: its Trainer then places and wraps nothing.
    causal_model(model)._is_distributed_loading_by_transformers = True


@contextlib.contextmanager
def no_exchange(accelerator: Any, model: Any) -> Iterator[None]:
    """Passes without exchange of gradients between processes; they add up in each of them."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def give_up_gathered(model: Any) -> None:
    """End what passes without gradients leave behind: gathered weights in the place of shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _without_weights(directory: Path) -> Any:
    """The model of a directory with its buffers, and with parameters that take no memory, tied as it says."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model: {error}", where=str(directory)) from None
    model.tie_weights()
    return model.eval()


def _places(directory: Path) -> dict[str, Path]:
    """The name of every stored tensor, and the file that has it."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(Path(directory).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _on_stubs(model: Any) -> Any:
    """The model with parameters on the CPU that all show one number: peft puts adapters beside them there.

    So adapters draw the numbers that they draw beside a loaded model.
    """
    zero = torch.zeros(())
    return _replaced(model, lambda weight: zero.to(weight.dtype).expand(weight.shape))


def _to_meta(model: Any) -> None:
    """The frozen parameters without memory; adapters keep theirs."""
    _replaced(model, lambda weight: weight.to("meta") if weight.stride() == (0,) * weight.ndim else weight)


def _replaced(model: Any, change: Any) -> Any:
    """The model with every parameter's data changed; tied parameters stay one."""
    changed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in changed:
                changed[id(weight)] = nn.Parameter(change(weight.detach()), weight.requires_grad)
            setattr(module, name, changed[id(weight)])
    return model


def _fill(model: Any, places: dict[str, Path], prefix: str) -> None:
    """Give each parameter without memory its shard of the stored tensor, in float32."""
    from safetensors import safe_open

    device = next(iter(model.parameters())).device_mesh.device_type
    shards = {}
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            continue
        stored = name.removeprefix(prefix).replace(".base_layer.", ".")
        each = -(-weight.shape[0] // weight.device_mesh.size())  # rows of a process; the last ones get fewer
        first = each * weight.device_mesh.get_local_rank()
        with safe_open(places[stored], "pt") as file:
            whole = file.get_slice(stored)
            if list(whole.get_shape()) != list(weight.shape):
                raise ModelError(
                    f"{stored} has the shape {whole.get_shape()}, not {list(weight.shape)}",
                    where=str(places[stored]),
                )
            part = whole[first : first + each]
        shards[name] = DTensor.from_local(
            part.to(device, weight.dtype, copy=True),  # `part` is the mapped file
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
    model.load_state_dict(shards, strict=False, assign=True)
    model.tie_weights()
