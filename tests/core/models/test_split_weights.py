"""float32 values in two halves: laws of splitting and joining, and models with bfloat16 matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qrpo_core.models.loading import load_model
from qrpo_core.models.split_weights import join_float32, round_matrices, split_float32, split_into

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=FINITE)


@given(MATRICES)
def test_the_halves_are_the_value_bit_for_bit(matrix: np.ndarray) -> None:
    values = torch.from_numpy(matrix)
    weight, low = split_float32(values)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_float32(weight, low).view(torch.int32), values.view(torch.int32))


@given(MATRICES)
def test_the_upper_half_is_a_neighbour_on_the_grid(matrix: np.ndarray) -> None:
    values = torch.from_numpy(matrix)
    weight, _ = split_float32(values)
    steps = weight.view(torch.int16).int() - (values.view(torch.int32) >> 16).to(torch.int16).int()
    assert torch.isin(steps, torch.tensor([0, 1])).all()  # towards zero, or away from it


@given(MATRICES)
def test_values_on_the_grid_stay(matrix: np.ndarray) -> None:
    values = torch.from_numpy(matrix).bfloat16().float()
    weight, _ = split_float32(values)
    assert torch.equal(weight.float(), values)


def test_infinities_and_nan_stay() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    weight, low = split_float32(values)
    assert torch.equal(weight[:2].float(), values[:2])
    assert weight[2].isnan()
    assert torch.equal(join_float32(weight, low).view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("shape", [(100, 100), (1, 10_000), (10_000, 1), (4, 50, 50)], ids=str)
def test_a_movement_far_below_the_grid_is_seen_in_the_mean(shape: tuple[int, ...]) -> None:
    """1 has a grid of 2**-7 above it: 1 % of a step rounds up 1 % of the values, nearest rounding none."""
    weight, _ = split_float32(torch.full(shape, 1 + 0.01 * 2**-7))
    raised = int((weight.float() > 1).sum())
    assert abs(raised - 100) <= 5  # evenly spread thresholds: off by a few, not by the root of 100


@given(MATRICES, st.integers(0, 9))
def test_parts_of_rows_are_split_as_the_whole(matrix: np.ndarray, cut: int) -> None:
    values = torch.from_numpy(matrix).reshape(-1, matrix.shape[-1])
    weight, low = split_float32(values)
    for part in (slice(0, cut), slice(cut, len(values))):
        rows, found = values[part].clone(), torch.empty_like(weight[part])
        split_into(rows, found, torch.empty_like(low[part]), first_row=part.start)
        assert torch.equal(found.view(torch.int16), weight[part].view(torch.int16))
        again = join_float32(weight[part], low[part], first_row=part.start)
        assert torch.equal(again.view(torch.int32), values[part].contiguous().view(torch.int32))


def test_under_autocast_the_arithmetic_is_that_of_float32_weights(tiny_model: Path) -> None:
    """On the bfloat16 grid, where most published weights lie, log-probs are equal bit for bit."""
    model = load_model(tiny_model, "float32")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=tokens).logits
        low_bits = round_matrices(model)
        assert torch.equal(model(input_ids=tokens).logits, expected)
    names = {name for name, parameter in model.named_parameters() if parameter in low_bits}
    assert names == {name for name, parameter in model.named_parameters() if "norm" not in name}
