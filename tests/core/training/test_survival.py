"""What is saved is what was trained: the measure, what it refuses, and that a refusal costs no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ModelError, ObjectiveError, StoreError
from qrpo_core.data.collator import Example, Pair
from qrpo_core.models.loading import load_model
from qrpo_core.training.saving import TRAINED
from qrpo_core.training.survival import (
    ROWS,
    LogprobComparison,
    float32_logprobs,
    require_same,
    require_share,
    rows_to_compare,
    survival,
)
from tests.core.training.runs import Train, simple_examples


def test_the_share_is_a_slope_through_the_origin() -> None:
    found = survival([-10, -10, -10], [-9, -12, -10], [-9.5, -11.5, -10.25])
    assert found.rows == 3
    assert found.share == pytest.approx((1 * 0.5 + 2 * 1.5) / 5)
    assert found.trained == pytest.approx(1.0)
    assert found.written == pytest.approx((0.5 + 1.5 + 0.25) / 3)
    assert found.largest_difference == pytest.approx(0.5)
    assert "70.0 % of the training survived (mean |log-ratio| 0.75 of 1 nats" in found.text


@given(
    st.lists(st.tuples(st.floats(-500, -1), st.floats(-9, 9)), min_size=1, max_size=64),
    st.floats(-3, 3),
)
def test_a_policy_that_went_a_part_of_the_way_has_that_share(
    rows: list[tuple[float, float]], part: float
) -> None:
    start = np.array([row[0] for row in rows])
    moved = np.array([row[1] for row in rows])
    found = survival(list(start), list(start + moved), list(start + part * moved))
    if found.share is not None:
        assert found.share == pytest.approx(part, abs=1e-6)
    assert found.written == pytest.approx(abs(part) * found.trained, abs=1e-9)


def test_a_training_that_float32_does_not_show_has_no_share() -> None:
    start = np.full(8, -400.0)
    assert survival(list(start), list(start + 1e-4), list(start)).share is None
    assert survival(list(start), list(start + 1.0), list(start)).share == 0.0
    require_same(list(start), list(start), list(start + 1e-4), adapted=False)
    with pytest.raises(ModelError, match=r"largest difference 1 nats, on 8"):
        require_same(list(start), list(start), list(start + 1.0), adapted=False)


@pytest.mark.parametrize(("share", "fits"), [(1.0, True), (0.91, True), (0.89, False), (1.2, False)])
def test_below_nine_tenths_a_rounded_policy_is_refused(share: float, fits: bool) -> None:
    start, moved = np.full(8, -40.0), np.linspace(-2, 2, 8)
    values = [list(values) for values in (start, start + moved, start + share * moved)]
    comparison = LogprobComparison("bfloat16", 1.0, [([1], [2])] * 8, *values)
    assert LogprobComparison.from_json(comparison.to_json()) == comparison
    if fits:
        require_share(comparison)
        return
    with pytest.raises(ModelError, match=r"\d+\.0 % of the training .* set training.save_dtype: float32"):
        require_share(comparison)


def test_an_untrained_policy_is_compared_by_its_differences() -> None:
    start = [-40.0] * 4
    rows = [([1], [2] * 10)] * 4
    require_share(LogprobComparison("bfloat16", 1.0, rows, start, start, [-40.5] * 4))
    with pytest.raises(ModelError, match="changed no log-prob by more than rounding"):
        require_share(LogprobComparison("bfloat16", 1.0, rows, start, start, [-44.0] * 4))


def test_rows_are_chosen_evenly_and_always_the_same() -> None:
    few, many = simple_examples(7, 2), simple_examples(1000, 2)
    assert rows_to_compare(few) == few
    chosen = rows_to_compare(many)
    assert len(chosen) == ROWS
    assert chosen == rows_to_compare(many)
    assert (chosen[0], chosen[-1]) == (many[0], many[-1])
    pairs = [Pair(*few[:2]), Pair(*few[2:4])]
    assert rows_to_compare(pairs) == few[:4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "training", [{}, {"lora_rank": 4}, {"precision": "bf16"}, {"precision": "bf16", "lora_rank": 4}], ids=str
)
def test_the_whole_training_is_saved(
    saved_model: Callable[..., Path], train: Train, tmp_path: Path, training: dict[str, Any], dtype: str
) -> None:
    start = saved_model(tied=True, dtype="bfloat16")
    comparison = train(start, save_dtype=dtype, learning_rate=3e-3, **training).comparison
    assert comparison is not None
    found = comparison.survival
    assert found.share == pytest.approx(1, abs=1e-4 if dtype == "float32" else 0.05)
    assert found.trained > 1
    assert found.largest_difference < (1e-3 if dtype == "float32" else 1)
    model = load_model(tmp_path / "one", "auto")
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tmp_path / "one" / "adapter").is_dir() == ("lora_rank" in training)


def test_rows_are_scored_at_the_temperature_of_the_training(tiny_model: Path, train: Train) -> None:
    cool, plain = (train(tiny_model, f"at {t}", temperature=t, work=f"{t}").comparison for t in (0.5, 1.0))
    assert cool is not None
    assert plain is not None
    assert cool.temperature == 0.5
    assert cool.survival.share == pytest.approx(1, abs=1e-4)
    device = torch.device("cpu")
    rows = [Example(*row) for row in cool.rows]
    at_half = float32_logprobs(load_model(tiny_model, "float32"), rows, device, 0.5)
    assert cool.start == pytest.approx(at_half)
    assert plain.start != pytest.approx(at_half)


def nearest(tensor: torch.Tensor, name: str) -> torch.Tensor:
    return tensor.bfloat16()


def test_a_refusal_costs_no_training(
    saved_model: Callable[..., Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kind of loss that this is for: a small learning rate, and rounding to the nearest."""
    start = saved_model(dtype="bfloat16")
    monkeypatch.setattr("qrpo_core.models.rounding.stochastic_bfloat16", nearest)
    seen: list[int] = []
    small: dict[str, Any] = {
        "learning_rate": 1e-5,
        "on_step": lambda step, *_: seen.append(step),
        "checkpoint_minutes": 0,
    }
    with pytest.raises(ModelError, match=r"saved in bfloat16, the policy differs from the trained one"):
        train(start, save_dtype="bfloat16", **small)
    assert seen == [1, 2, 3]
    assert not (tmp_path / "one").exists()
    assert not list((tmp_path / "work").glob("checkpoint-*")), "a training that is done needs none"
    done = train(start, save_dtype="float32", **small)
    assert seen == [1, 2, 3], "nothing was trained again"
    assert [entry["step"] for entry in done.history] == [1, 2, 3]
    assert done.comparison is not None
    assert done.comparison.survival.share == pytest.approx(1, abs=0.01)
    trained = (tmp_path / "work" / TRAINED / "policy" / "model.safetensors").read_bytes()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == trained


def test_a_damaged_rest_is_trained_again(tiny_model: Path, train: Train, tmp_path: Path) -> None:
    first = train(tiny_model)
    weights = tmp_path / "work" / TRAINED / "policy" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(expected[:-1])
    seen: list[int] = []
    again = train(tiny_model, "two", on_step=lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3]
    assert [entry["loss"] for entry in again.history] == [entry["loss"] for entry in first.history]
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == expected


def test_a_config_that_says_another_dtype_is_refused(
    tiny_model: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qrpo_core.training import saving

    def keep(*given: Any, work: Path, **named: Any) -> Any:
        done = kept(*given, work=work, **named)
        path = work / TRAINED / "policy" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
        return done

    kept = saving.store_trained
    monkeypatch.setattr("qrpo_core.training.run.store_trained", keep)
    with pytest.raises(ModelError, match="the saved policy loads in bfloat16, not in float32"):
        train(tiny_model)


def test_a_training_that_diverged_says_so(tiny_model: Path, train: Train, tmp_path: Path) -> None:
    for training in ({}, {"lora_rank": 4}):
        with pytest.raises(ObjectiveError, match=r"not finite: training diverged.*learning_rate"):
            train(tiny_model, items=simple_examples(4), learning_rate=1e20, **training)
        assert not (tmp_path / "work" / TRAINED).exists()


def test_a_class_that_keeps_some_weights_in_float32_is_saved_in_bfloat16(
    saved_model: Callable[..., Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"gate_proj"})
    comparison = train(saved_model(), save_dtype="bfloat16").comparison
    assert comparison is not None
    assert comparison.survival.share == pytest.approx(1, abs=0.1)
    kinds = {str(weight.dtype) for weight in load_model(tmp_path / "one", "auto").parameters()}
    assert kinds == {"torch.bfloat16", "torch.float32"}


@pytest.mark.parametrize("swapped", ["template", "tokens"])
def test_a_tokenizer_that_is_saved_as_another_is_refused_before_training(
    tiny_model: Path, train: Train, tmp_path: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast.save_pretrained

    def other(self: Any, folder: Any, **named: Any) -> Any:
        found = plain(self, folder, **named)
        if swapped == "template":
            (Path(folder) / "chat_template.jinja").write_text("{{ messages }}")
        else:
            path = Path(folder) / "tokenizer.json"
            core = json.loads(path.read_text())
            vocabulary = core["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            path.write_text(json.dumps(core))
        return found

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", other)
    seen: list[int] = []
    with pytest.raises(ModelError, match="the tokenizer is another one once it is saved"):
        train(tiny_model, on_step=lambda step, *_: seen.append(step))
    assert not seen
    monkeypatch.setattr("qrpo_core.training.run.check_tokenizer", lambda *given: None)
    with pytest.raises(ModelError, match="the tokenizer is another one once it is saved"):
        train(tiny_model)
    assert not (tmp_path / "one").exists()
    assert (tmp_path / "work" / TRAINED).is_dir(), "the training is kept"


def test_a_disk_that_is_full_is_told_and_costs_no_training(
    tiny_model: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("qrpo_core.training.saving.write_bfloat16", full)
        with pytest.raises(StoreError, match=r"cannot write the trained policy: .*No space left"):
            train(tiny_model, save_dtype="bfloat16", on_step=lambda step, *_: seen.append(step))
    train(tiny_model, save_dtype="bfloat16", on_step=lambda step, *_: seen.append(step))
    assert seen == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.long
def test_the_real_model_keeps_a_small_training_and_nearest_rounding_loses_it(
    smollm2: Path, train: Train, tmp_path: Path
) -> None:
    rows = simple_examples(16, length=8)
    small = {"items": rows, "learning_rate": 1e-6, "batch_size": 8, "epochs": 2}
    comparison = train(smollm2, save_dtype="bfloat16", **small).comparison
    assert comparison is not None
    kept = comparison.survival
    assert kept.share == pytest.approx(1, abs=0.1)
    assert kept.written >= 0.9 * kept.trained > 0
    cast = load_model(tmp_path / "work" / TRAINED / "policy", "bfloat16").float()
    found = survival(comparison.start, comparison.trained, float32_logprobs(cast, rows, torch.device("cpu")))
    assert found.share is not None
    assert found.share < 0.5
