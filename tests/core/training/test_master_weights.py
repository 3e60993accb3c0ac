"""AdamW on bfloat16 weights with float32 masters takes the steps of AdamW on float32 weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qrpo_core.models.split_weights import join_float32, split_float32
from qrpo_core.training import master_weights
from qrpo_core.training.master_weights import MasterAdamW

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=3)


def optimisers(shapes: list[list[int]], seed: int, **options: Any) -> Any:
    """(float32 parameters, their AdamW, bfloat16 parameters of the same masters, their MasterAdamW)."""
    draw = torch.Generator().manual_seed(seed)
    whole = [nn.Parameter(0.1 * torch.randn(shape, generator=draw)) for shape in shapes]
    split, low_bits = [], {}
    for parameter in whole:
        weight, low = split_float32(parameter.data)
        split.append(nn.Parameter(weight))
        low_bits[split[-1]] = low
    return (
        whole,
        torch.optim.AdamW(whole, fused=True, **options),
        split,
        MasterAdamW(split, low_bits, **options),
    )


def give_gradients(draw: torch.Generator, *pairs: tuple[nn.Parameter, nn.Parameter]) -> None:
    for whole, split in pairs:
        split.grad = torch.randn(whole.shape, generator=draw).bfloat16()
        whole.grad = split.grad.float()


def assert_same(whole: list[nn.Parameter], split: list[nn.Parameter], masters: MasterAdamW) -> None:
    for float32, bfloat16 in zip(whole, split, strict=True):
        assert torch.equal(float32, join_float32(bfloat16.detach(), masters.state[bfloat16]["low_bits"]))
        assert torch.equal(split_float32(float32.data)[0], bfloat16)


@given(
    shapes=SHAPES,
    seed=st.integers(0, 99),
    lr=st.sampled_from([1e-7, 1e-6, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    chunk=st.sampled_from([1, 5, 1 << 24]),
)
@settings(max_examples=30, deadline=None)
def test_the_trajectory_is_that_of_float32_weights(
    shapes: list[list[int]], seed: int, lr: float, weight_decay: float, chunk: int
) -> None:
    """Bit for bit, whatever is in float32 at a time; at a learning rate of 1e-7, too, nothing is lost."""
    whole, adamw, split, masters = optimisers(shapes, seed, lr=lr, weight_decay=weight_decay)
    draw = torch.Generator().manual_seed(seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(master_weights, "_CHUNK", chunk)
        for _ in range(5):
            give_gradients(draw, *zip(whole, split, strict=True))
            adamw.step()
            masters.step()
            assert_same(whole, split, masters)


def test_a_loaded_state_goes_on_as_if_nothing_had_happened() -> None:
    whole, adamw, split, masters = optimisers([[3, 4], [5]], 0, lr=1e-6)
    draw = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:
            kept = copy.deepcopy(masters.state_dict())
            again = [nn.Parameter(parameter.detach().clone()) for parameter in split]
            nothing = {parameter: torch.zeros_like(parameter, dtype=torch.int16) for parameter in again}
            split, masters = again, MasterAdamW(again, nothing, lr=1.0)
            masters.load_state_dict(kept)
        give_gradients(draw, *zip(whole, split, strict=True))
        adamw.step()
        masters.step()
    assert_same(whole, split, masters)
    masters.restore()
    for float32, restored in zip(whole, split, strict=True):
        assert torch.equal(float32, restored)


def test_vectors_that_stay_float32_and_parameters_without_gradients() -> None:
    weight, low = split_float32(torch.ones(2, 2))
    matrix, vector, unused = nn.Parameter(weight), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    masters = MasterAdamW([matrix, vector, unused], {matrix: low}, lr=1e-6)
    vector.grad = torch.ones(3)
    masters.step()
    assert torch.equal(vector.detach(), torch.full((3,), np.float32(1) - np.float32(1e-6)))
    assert torch.equal(matrix, weight)
    assert torch.equal(unused, torch.ones(2))
    masters.restore()
    assert torch.equal(matrix, torch.ones(2, 2))
