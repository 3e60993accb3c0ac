"""The log-ratio that a training sees is the one that its saved policy has, in float32 arithmetic.

Published weights lie on the bfloat16 grid, and float32 weights under autocast are rounded back to it: a
training that moves them by less than half a grid step does not see that they moved; the saved policy moved.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.models.precision import native_bfloat16
from qrpo_core.training.run import train_policy
from qrpo_core.training.survival import float32_logprobs

pytestmark = pytest.mark.skipif(not native_bfloat16("cpu"), reason="no native bfloat16: all is float32")

BETA, TARGET, STEPS = 0.1, 3.0, 6  # nats of log-ratio


@dataclass(frozen=True)
class Seen:
    """Mean log-ratio and loss after STEPS steps: of the policy in training, and of the saved one."""

    logged: float
    saved: float
    logged_loss: float
    saved_loss: float


@pytest.fixture(scope="module")
def on_the_grid(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough that many small movements add up; its weights are bfloat16 values."""
    folder = tmp_path_factory.mktemp("grid") / "model"
    tokenizer = load_tokenizer(tiny_model)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def seen(model: Path, folder: Path, **settings: Any) -> Seen:
    """Train on one batch again and again; the entry of step STEPS + 1 is of the policy after STEPS steps."""
    draw = np.random.default_rng(0)
    rows = [
        Example(*(draw.integers(0, 256, size).tolist() for size in (5, 24)), TARGET * BETA, BETA)
        for _ in range(16)
    ]
    schedule = {"warmup_ratio": 0, "schedule": "constant_with_warmup", "batch_size": len(rows)}
    training = TrainingConfig.model_validate(schedule | settings)
    engine = TransformersEngine(model, precision=training.arithmetic)
    asked = [LogprobRequest(row.prompt_token_ids, row.token_ids) for row in rows]
    scores = engine.logprobs(asked).tolist()
    rows = [replace(row, ref_logprob=score) for row, score in zip(rows, scores, strict=True)]
    for steps in (STEPS, STEPS + 1):
        done = train_policy(
            rows,
            model,
            folder / f"after-{steps}",
            objective=ObjectiveConfig(beta=BETA),
            training=training.model_copy(update={"epochs": steps}),
            work=folder / f"work-{steps}",
        )
    start, saved = (
        np.array(float32_logprobs(load_model(place, "float32"), rows, torch.device("cpu")))
        for place in (model, folder / f"after-{STEPS}")
    )
    ratios = saved - start
    last = done.history[-1]
    loss = float(np.mean((TARGET * BETA - BETA * ratios) ** 2))
    return Seen(last["log_ratio"], float(ratios.mean()), last["loss"], loss)


@pytest.mark.parametrize("rate", [1e-6, 5e-6, 1e-5])
def test_the_default_sees_the_policy_that_it_saves(on_the_grid: Path, tmp_path: Path, rate: float) -> None:
    """Within a twentieth: a movement of a hundredth of the grid is one weight in a hundred, a whole step."""
    found = seen(on_the_grid, tmp_path, learning_rate=rate)
    assert found.saved > 0.03
    assert found.logged == pytest.approx(found.saved, rel=0.05)
    fallen = (TARGET * BETA) ** 2 - found.saved_loss
    assert found.logged_loss == pytest.approx(found.saved_loss, abs=0.05 * fallen)


@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"lora_rank": 8}], ids=["fp32", "adapters"])
def test_so_do_float32_and_adapters(on_the_grid: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Adapters want larger learning rates; B starts at 0, where the grid is as fine as the movement."""
    rate = 5e-5 if "lora_rank" in settings else 5e-6
    found = seen(on_the_grid, tmp_path, learning_rate=rate, **settings)
    assert found.logged == pytest.approx(found.saved, rel=0.05)


@pytest.mark.parametrize("rate", [1e-6, 5e-6])
def test_known_fault_float32_weights_under_autocast_hide_the_movement(
    on_the_grid: Path, tmp_path: Path, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept to show that the law above can fail; the log says what this arithmetic does."""
    with caplog.at_level(logging.WARNING, "qrpo.train"):
        found = seen(on_the_grid, tmp_path, learning_rate=rate, weights_dtype="float32")
    assert found.logged < 0.8 * found.saved
    assert "rounds small movements away" in caplog.text
