"""A step waits for no number from the device, and its entry is the Trainer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from qrpo_core.data.collator import Example
from qrpo_core.models.precision import native_bfloat16
from qrpo_core.training.deferred_log import DeferredLogTrainer
from tests.core.training.runs import history, load, make_trainer, run_trainer

needs_bfloat16 = pytest.mark.skipif(not native_bfloat16("cpu"), reason="no native bfloat16")

#: Operations whose result the host waits for on a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class Counted(TorchDispatchMode):
    """Counts the operations of each step by name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.steps[-1][func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counted.steps.append(Counter())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"bf16": True, "weights_dtype": "bfloat16"}, marks=needs_bfloat16),
        {"max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_a_step_waits_for_no_number(
    tiny_model: Path, examples: list[Example], tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"optim": "adamw_torch_fused", "max_tokens": 10**6} | settings
    trainer = make_trainer(examples, load(tiny_model), tmp_path, **settings)
    with Counted() as counted:
        trainer.add_callback(Steps(counted))
        trainer.train()
    _, *steps = counted.steps
    assert len(steps) == 6
    within_epochs = [step for place, step in enumerate(steps) if place % 3 < 2]  # a new one seeds the loader
    for step in within_epochs:
        assert not {name: step[name] for name in WAITS if step[name]}


@pytest.mark.parametrize("logging_steps", [1, 2, 4])
def test_entries_are_those_of_the_trainer(
    tiny_model: Path,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logging_steps: int,
) -> None:
    settings = {"logging_steps": logging_steps, "optim": "adamw_torch_fused"}
    deferred = run_trainer(examples, tiny_model, tmp_path / "deferred", **settings)
    monkeypatch.setattr(DeferredLogTrainer, "_maybe_log_save_evaluate", Trainer._maybe_log_save_evaluate)
    plain = run_trainer(examples, tiny_model, tmp_path / "plain", **settings)
    names = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    found = [{name: entry[name] for name in names} for entry in history(deferred)]
    assert found == [{name: entry[name] for name in names} for entry in history(plain)]
    assert deferred.state.log_history[-1]["train_loss"] == plain.state.log_history[-1]["train_loss"]


def test_a_checkpoint_has_the_entries_of_its_steps(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    trainer = run_trainer(examples, tiny_model, tmp_path, save_strategy="steps", save_steps=2)
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in history(trainer)])).all()
    state = type(trainer.state).load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert [entry["step"] for entry in state.log_history] == [1, 2, 3, 4]
