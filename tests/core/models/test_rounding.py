"""Rounding to bfloat16 at random: laws of the rounding, and the copies that are made with it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from qrpo_core.common.errors import StoreError
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.models.rounding import engine_directory, stochastic_bfloat16, write_bfloat16

LARGEST = torch.finfo(torch.bfloat16).max


def floats(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_values_of_the_grid_stay_bit_by_bit(halves: list[int]) -> None:
    grid = floats([(half << 16) - (1 << 32) * (half >> 15) for half in halves])
    rounded = stochastic_bfloat16(grid, "w")
    assert rounded.dtype == torch.bfloat16
    numbers = ~grid.isnan()
    assert torch.equal(rounded.isnan(), grid.isnan())
    assert torch.equal(rounded.float().view(torch.int32)[numbers], grid.view(torch.int32)[numbers])


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_other_values_go_to_a_neighbour_on_the_grid(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float32)
    rounded = stochastic_bfloat16(exact, "w").float()
    assert torch.equal(rounded.isnan(), exact.isnan())
    assert torch.equal(rounded.isinf(), exact.isinf()), "what is finite stays so"
    finite = exact.isfinite()
    steps = (rounded.view(torch.int32) >> 16) - (exact.view(torch.int32) >> 16)
    within = exact.abs() <= LARGEST
    assert steps[finite & within].ge(0).all()
    assert steps[finite & within].le(1).all()
    assert torch.equal(rounded[finite & ~within].abs(), torch.full_like(rounded[finite & ~within], LARGEST))


@pytest.mark.parametrize("value", [0.1, -0.1, 1 + 1e-6, -3.14159, 1e-30, 2e-40, 3e38, 0.30000001])
def test_the_mean_is_the_value_itself(value: float) -> None:
    count = 1 << 18
    exact = torch.full((count,), value, dtype=torch.float32)
    rounded = stochastic_bfloat16(exact, "some.weight").double().numpy()
    low, high = rounded.min(), rounded.max()
    assert low <= float(exact[0]) <= high
    share = abs(float(exact[0]) - low) / (high - low)
    deviation = (high - low) * np.sqrt(share * (1 - share) / count)
    assert abs(rounded.mean() - float(exact[0])) < 5 * deviation


def test_the_draw_is_the_names_own() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    one = stochastic_bfloat16(weight, "a")
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(one, stochastic_bfloat16(weight, "a"))
    assert not torch.equal(one, stochastic_bfloat16(weight, "b"))
    assert torch.equal(
        stochastic_bfloat16(weight.t(), "a"), stochastic_bfloat16(weight.t().contiguous(), "a")
    )
    assert stochastic_bfloat16(torch.tensor(0.3), "a").shape == ()


def test_what_two_policies_share_is_rounded_alike() -> None:
    """A weight that moved by a hundredth of the grid is rounded apart as seldom as that."""
    start = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 1e-3 + 0.15
    moved = start + 1e-5  # the grid here is 9.8e-4
    apart = (stochastic_bfloat16(start, "w") != stochastic_bfloat16(moved, "w")).float().mean()
    assert float(apart) == pytest.approx(1e-5 / 2**-10, rel=0.15)


@pytest.fixture(params=["whole", "tied", "sharded"])
def float32_policy(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A float32 policy with tied or own weights, in one file or in several."""
    model = load_model(tiny_model, "float32")
    if request.param == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    folder = tmp_path / "policy"
    model.save_pretrained(folder, max_shard_size="60KB" if request.param == "sharded" else "1GB")
    load_tokenizer(tiny_model).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"no part of the policy")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (request.param == "sharded")
    return folder


def test_a_policy_is_written_rounded_and_else_the_same(float32_policy: Path, tmp_path: Path) -> None:
    write_bfloat16(float32_policy, tmp_path / "out")
    before, after = load_model(float32_policy, "float32"), load_model(tmp_path / "out", "auto")
    names = dict(before.named_parameters())
    assert names.keys() == dict(after.named_parameters()).keys()
    for name, weight in after.named_parameters():
        assert torch.equal(weight, stochastic_bfloat16(names[name], name)), name
    tied = after.lm_head.weight is after.model.embed_tokens.weight
    assert tied == (before.lm_head.weight is before.model.embed_tokens.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert after.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(float32_policy).chat_template
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_an_engine_gets_a_copy_only_where_it_would_round(float32_policy: Path, tmp_path: Path) -> None:
    assert engine_directory(float32_policy, "float32") == float32_policy
    copy = engine_directory(float32_policy, "bfloat16")
    assert copy != float32_policy
    made = (copy / "config.json").stat().st_mtime_ns
    assert engine_directory(float32_policy, "bfloat16") == copy
    assert (copy / "config.json").stat().st_mtime_ns == made, "made once"
    assert engine_directory(copy, "bfloat16") == copy, "what is on the grid is loaded as it is"
    assert not list(copy.parent.glob("*.part"))


@pytest.mark.parametrize("damage", ["a file is gone", "weights are cut off", "killed while writing"])
def test_a_copy_that_is_not_whole_is_made_again(float32_policy: Path, damage: str) -> None:
    copy = engine_directory(float32_policy, "bfloat16")
    expected = {path.name: path.read_bytes() for path in copy.iterdir()}
    weights = max(copy.glob("*.safetensors"))
    part = copy.with_name(f"{copy.name}.part")
    if damage == "a file is gone":
        (copy / "tokenizer.json").unlink()
    elif damage == "weights are cut off":
        weights.write_bytes(expected[weights.name][:-1])
    else:
        copy.rename(part)
        (part / "config.json").unlink()
        (part / "of a run before").write_bytes(b"")
    assert engine_directory(float32_policy, "bfloat16") == copy
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == expected
    assert not part.exists()


def test_runs_that_need_the_same_copy_at_once_make_it_once(
    float32_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def slowly(directory: Path, out: Path) -> None:
        made.append(out)
        write_bfloat16(directory, out)

    monkeypatch.setattr("qrpo_core.models.rounding.write_bfloat16", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine_directory(float32_policy, "bfloat16"), range(4)))
    assert len(set(found)) == len(made) == 1


def test_a_new_copy_makes_old_ones_go(
    float32_policy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison evaluates many policies, and each is copied."""
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QRPO_CACHE_GB", "0")
    old = engine_directory(float32_policy, "bfloat16")
    for path in (*old.iterdir(), old, old.with_name(f"{old.name}.used")):
        os.utime(path, (0, 0))
    other = tmp_path / "other"
    load_model(tiny_model, "float32").float().save_pretrained(other)
    load_tokenizer(tiny_model).save_pretrained(other)
    new = engine_directory(other, "bfloat16")
    assert [path for path in new.parent.iterdir() if path.is_dir()] == [new]
    assert engine_directory(float32_policy, "bfloat16") == old, "made again"


def test_a_cache_that_cannot_hold_the_copy_is_named(
    float32_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"cannot write the bfloat16 copy .*QRPO_CACHE"):
        engine_directory(float32_policy, "bfloat16")
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))

    def full(*given: Any, **named: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StoreError, match="No space left on device"):
        engine_directory(float32_policy, "bfloat16")
    assert not [path for path in (tmp_path / "cache" / "rounded").iterdir() if path.is_dir()]


def test_a_quantised_model_is_left_alone(float32_policy: Path) -> None:
    config = float32_policy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}))
    assert engine_directory(float32_policy, "bfloat16") == float32_policy


def weights_of(engine: TransformersEngine) -> dict[str, torch.Tensor]:
    return dict(engine._model.named_parameters())


def test_the_engine_draws_from_weights_rounded_at_random(
    float32_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dict(load_model(float32_policy, "float32").named_parameters())
    monkeypatch.setattr("qrpo_core.models.precision.native_bfloat16", lambda device: True)
    engine = TransformersEngine(float32_policy, "bfloat16", device="cpu")
    assert engine.name == "transformers/cpu/bfloat16"
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, stochastic_bfloat16(exact[name], name)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_where_float32_is_computed_nothing_is_rounded(
    float32_policy: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dict(load_model(float32_policy, "float32").named_parameters())
    monkeypatch.setattr("qrpo_core.models.precision.native_bfloat16", lambda device: False)
    engine = TransformersEngine(float32_policy, dtype, device="cpu")
    assert engine.name == "transformers/cpu/float32"
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, exact[name]), name
