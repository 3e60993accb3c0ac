"""Trainings whose matrices are bfloat16: nothing of them is lost, and they begin where the reference does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qrpo_core.common.errors import ConfigError
from qrpo_core.data.collator import Example
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model
from qrpo_core.models.precision import native_bfloat16
from tests.core.training.runs import Train, load, make_trainer, simple_examples

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
needs_bfloat16 = pytest.mark.skipif(
    not native_bfloat16("cpu"), reason="no native bfloat16: weights stay float32"
)

WEIGHTS: dict[str, Any] = {"precision": "bf16", "weights_dtype": "bfloat16"}
ADAPTERS: dict[str, Any] = {"precision": "bf16", "lora_rank": 4, "lora_base": "bfloat16"}


@pytest.mark.parametrize("settings", [WEIGHTS, ADAPTERS], ids=["weights", "adapters"])
def test_log_ratios_begin_at_zero(tiny_model: Path, train: Train, settings: dict[str, Any]) -> None:
    """The tiny model is off the bfloat16 grid: its reference log-probs are those of the rounded matrices."""
    engine = TransformersEngine(tiny_model, precision="bf16-weights")
    rows = simple_examples(8)
    logprobs = engine.logprobs([LogprobRequest(row.prompt_token_ids, row.token_ids) for row in rows])
    items = [
        Example(row.prompt_token_ids, row.token_ids, row.target, row.beta, value)
        for row, value in zip(rows, logprobs.tolist(), strict=True)
    ]
    first = train(tiny_model, items=items, **settings).history[0]
    assert abs(first["log_ratio"]) < 1e-4
    assert abs(first["kl"]) < 1e-6


@pytest.mark.parametrize("settings", [WEIGHTS, ADAPTERS], ids=["weights", "adapters"])
def test_a_training_survives_at_a_small_learning_rate(
    tiny_model: Path, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    done = train(tiny_model, learning_rate=1e-6, **settings)
    assert done.comparison is not None
    start, saved = load_model(tiny_model, "float32"), load_model(tmp_path / "one", "float32")
    if "lora_rank" in settings:
        assert torch.equal(saved.lm_head.weight, start.lm_head.weight), "merged from unrounded matrices"
    else:
        moved = (saved.lm_head.weight - start.lm_head.weight).detach().abs()
        assert float(moved.max()) <= 3 * 1e-6 * 1.01  # Adam's steps are at most the learning rate
        assert float((moved > 0).float().mean()) > 0.9
    share = done.comparison.survival.share
    assert share is None or share == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("settings", [WEIGHTS, ADAPTERS], ids=["weights", "adapters"])
def test_a_resumed_training_is_the_uninterrupted_one(
    tiny_model: Path, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def stop(step: int, steps: int, logged: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    settings = settings | {"checkpoint_minutes": 0, "learning_rate": 1e-4}
    whole = train(tiny_model, "whole", work="whole-work", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, "cut", work="cut-work", on_step=stop, **settings)
    resumed = train(tiny_model, "cut", work="cut-work", **settings)
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in whole.history]
    weights = [load_model(tmp_path / name, "float32").state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@needs_bfloat16
def test_matrices_are_bfloat16_while_they_are_trained(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        simple_examples(8),
        load(tiny_model),
        tmp_path,
        weights_dtype="bfloat16",
        bf16=True,
        optim="adamw_torch",
    )
    parameters = dict(trainer.model.named_parameters())
    assert {name for name, weight in parameters.items() if weight.dtype == torch.float32} == {
        name for name in parameters if "norm" in name
    }
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trainer.restore_weights()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"bf16": False}, "bfloat16 weights without autocast: set bf16=True"),
        ({"bf16": True, "optim": "sgd"}, "weights_dtype 'bfloat16' with optim"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_trainer(
            simple_examples(8), load(tiny_model), tmp_path, weights_dtype="bfloat16", **settings
        ).train()
