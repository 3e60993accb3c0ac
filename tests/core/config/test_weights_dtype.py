"""What training.weights_dtype auto is, and which arithmetic follows for reference log-probs."""

from __future__ import annotations

from typing import Any

import pytest

from qrpo_core.config import TrainingConfig

WHOLE, AUTOCAST, FP32 = "bf16-weights", "bf16", "fp32"


@pytest.mark.parametrize(
    ("settings", "dtype", "arithmetic", "hides"),
    [
        ({}, "bfloat16", WHOLE, False),
        ({"processes": 8}, "bfloat16", WHOLE, False),
        ({"weights_dtype": "auto", "precision": "bf16"}, "bfloat16", WHOLE, False),
        ({"weights_dtype": "bfloat16"}, "bfloat16", WHOLE, False),
        ({"weights_dtype": "float32"}, "float32", AUTOCAST, True),
        ({"parallel": "fsdp", "processes": 8}, "float32", AUTOCAST, True),
        ({"deepspeed": "ds.json"}, "float32", AUTOCAST, True),
        ({"lora_rank": 8}, "float32", AUTOCAST, False),
        ({"lora_rank": 8, "lora_base": "bfloat16"}, "float32", WHOLE, False),
        ({"lora_rank": 8, "weights_dtype": "float32"}, "float32", AUTOCAST, False),
        ({"precision": "fp32"}, "float32", FP32, False),
        ({"precision": "fp32", "weights_dtype": "float32"}, "float32", FP32, False),
        ({"precision": "fp32", "parallel": "fsdp", "processes": 2}, "float32", FP32, False),
    ],
)
def test_what_auto_is(settings: dict[str, Any], dtype: str, arithmetic: str, hides: bool) -> None:
    training = TrainingConfig(**settings)
    assert (training.trained_dtype, training.arithmetic, training.hides_movements) == (
        dtype,
        arithmetic,
        hides,
    )
