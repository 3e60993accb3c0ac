"""Recipes hold what training.weights_dtype resolves to, and results warn of float32 weights under bf16."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qrpo_core.pipeline import training
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_recipes import LogprobSettings
from qrpo_core.pipeline.run_headlines import Finished, hidden_movements
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.recipe import Recipe
from tests.core.small_experiment import changed

Asked = dict[str, Any]
BF16: Asked = {"precision": "bf16"}
SHARDS: Asked = BF16 | {"parallel": "fsdp", "processes": 2}


def keys(settings: Asked, asked: Asked) -> tuple[str, str]:
    """The cache key of a training, and the arithmetic in the recipe of its log-probs."""
    experiment = changed(settings, training=asked)
    made = training.recipe(Workspace(experiment), Recipe("training_set", 1), Policy("policy", Path))
    return made.key, LogprobSettings.of_training(experiment).precision


def test_a_recipe_holds_what_auto_is(settings: Asked) -> None:
    auto, float32 = keys(settings, BF16), keys(settings, BF16 | {"weights_dtype": "float32"})
    assert auto == keys(settings, BF16 | {"weights_dtype": "bfloat16"})
    assert auto == keys(settings, BF16 | {"processes": 8})
    assert float32 == keys(settings, SHARDS)
    assert auto[0] != float32[0]
    assert (auto[1], float32[1]) == ("bf16-weights", "bf16")


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (BF16, None),
        ({"precision": "fp32"}, None),
        (BF16 | {"lora_rank": 4}, None),
        (SHARDS, "Set training.precision fp32."),
        (BF16 | {"deepspeed": "ds.json"}, "Set training.precision fp32."),
        (BF16 | {"weights_dtype": "float32"}, "Set training.weights_dtype auto."),
    ],
)
def test_float32_weights_under_bf16_are_a_warning(settings: Asked, asked: Asked, remedy: str | None) -> None:
    experiment = changed(settings, training=asked)
    found = list(hidden_movements(Finished(experiment, SimpleNamespace(), (), SimpleNamespace())))  # type: ignore[arg-type]
    assert len(found) == (remedy is not None)
    for line in found:
        assert line.severity == "warning"
        assert "benchmarks/results/weights_dtype.json" in line.text
        assert line.text.endswith(str(remedy))
