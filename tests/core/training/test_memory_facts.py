"""The bytes a parameter that are stated are the bytes that a training holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrpo_core.config import TrainingConfig
from qrpo_core.models.precision import native_bfloat16
from qrpo_core.training.memory_facts import frozen_matrix, trained_matrix
from tests.core.training.runs import load, make_trainer, simple_examples


@pytest.mark.skipif(not native_bfloat16("cpu"), reason="no native bfloat16: weights stay float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_are_those_of_a_training(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    stated = trained_matrix(TrainingConfig.model_validate({"weights_dtype": dtype}))
    settings = {"weights_dtype": dtype, "bf16": True, "optim": "adamw_torch_fused", "num_train_epochs": 1}
    trainer = make_trainer(simple_examples(4), load(tiny_model), tmp_path, **settings)
    gradients: dict[str, int] = {}
    parameters = {name: weight for name, weight in trainer.model.named_parameters() if weight.dim() > 1}
    for name, weight in parameters.items():
        weight.register_post_accumulate_grad_hook(
            lambda weight, name=name: gradients.__setitem__(name, weight.grad.nbytes)
        )
    trainer.train()
    for name, weight in parameters.items():
        state = trainer.optimizer.state[weight]
        assert weight.nbytes == stated.weight * weight.numel()
        assert gradients[name] == stated.gradient * weight.numel()
        assert state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes == stated.moments * weight.numel()
        assert ("low_bits" in state) == bool(stated.low_bits)
        if stated.low_bits:
            assert state["low_bits"].nbytes == stated.low_bits * weight.numel()


def test_the_settings_by_their_bytes() -> None:
    def bytes_of(**settings: object) -> tuple[int, int]:
        training = TrainingConfig.model_validate(settings)
        return trained_matrix(training).state, frozen_matrix(training).state

    assert bytes_of()[0] == bytes_of(weights_dtype="bfloat16")[0] == 14
    assert bytes_of(weights_dtype="float32")[0] == bytes_of(parallel="fsdp", processes=2)[0] == 16
    assert bytes_of(lora_rank=4) == (16, 4)
    assert bytes_of(lora_rank=4, lora_base="bfloat16") == (16, 2)
