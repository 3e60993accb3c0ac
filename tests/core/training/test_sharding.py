"""FSDP2's loading: each process has its shards of the stored weights, and never a whole one."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import TrainingConfig
from qrpo_core.models.loading import load_model
from qrpo_core.training.lora import add_adapters
from qrpo_core.training.sharding import load_shards
from tests.core.training.runs import make_trainer, simple_examples

LORA = {"lora_rank": 4, "lora_alpha": 8}


class Largest(TorchDispatchMode):
    """The most numbers in memory that one operation wrote.

    Not counted: memory that is reserved and never written (`empty`), and the pages of the mapped files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self._mapped: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for each in given if isinstance(given, list | tuple) else (given,):
            each = each.to_local() if isinstance(each, DTensor) else each
            if not isinstance(each, torch.Tensor) or each.is_meta or "empty" in func.__name__:
                continue
            memory = each.untyped_storage()
            if func.__name__ == "set_.source_Storage":
                self._mapped.add(memory.data_ptr())
            elif memory.data_ptr() not in self._mapped:
                self.numbers = max(self.numbers, memory.nbytes() // each.itemsize)
        return given


def check(directory: Path, lora: dict[str, Any]) -> None:
    """What each process asserts."""
    torch.distributed.init_process_group("gloo")
    training = TrainingConfig.model_validate({"parallel": "fsdp", **lora})
    torch.manual_seed(0)
    with Largest() as largest:
        model = load_shards(directory, training, torch.device("cpu"))
    torch.manual_seed(0)
    whole = load_model(directory, "float32")
    whole = add_adapters(whole, training) if lora else whole
    matrices = [weight.numel() for name, weight in whole.named_parameters() if "lora_" not in name]
    assert 0 < largest.numbers < max(matrices)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight.full_tensor(), expected[name]), name
        assert weight.requires_grad == expected[name].requires_grad
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in whole.named_buffers())
    ids = torch.arange(12)[None]
    assert torch.allclose(model(ids).logits, whole.train()(ids).logits, rtol=1e-4, atol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("stored", "lora", "processes"),
    [
        ({}, {}, 2),
        ({"tied": True}, {}, 2),
        ({"tied": True}, LORA, 2),
        ({"dtype": "bfloat16"}, LORA, 2),
        pytest.param({}, LORA, 3, marks=pytest.mark.slow),  # the third has no row of an adapter of rank 4
    ],
    ids=str,
)
def test_each_process_loads_its_shards(
    server: ForkServerContext,
    saved_model: Callable[..., Path],
    stored: dict[str, Any],
    lora: dict[str, Any],
    processes: int,
) -> None:
    directory = saved_model(**stored)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = {"DIRECTORY": str(directory), "LORA_SETTINGS": lora}
    started = [
        server.Process(
            target=runpy.run_path,
            args=(__file__, {**given, "RANK": common | {"RANK": str(rank)}}, "rank"),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * processes


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"weights_dtype": "bfloat16", "bf16": True}, "bfloat16 weights in shards: leave weights in float32"),
        ({"compile": "always"}, "compiled layers in shards: set compile='auto'"),
    ],
    ids=["bfloat16", "compiled"],
)
def test_a_divided_model_has_neither_bfloat16_weights_nor_compiled_layers(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    """A model of another caller than the pipeline's, whose settings refuse both by name."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = load_shards(tiny_model, TrainingConfig(), torch.device("cpu"))
        with pytest.raises(ConfigError, match=problem):
            make_trainer(simple_examples(8), model, tmp_path, **settings)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "rank":
    os.environ.update(RANK)  # type: ignore[name-defined]  # noqa: F821
    check(Path(DIRECTORY), LORA_SETTINGS)  # type: ignore[name-defined]  # noqa: F821
    sys.exit(0)
