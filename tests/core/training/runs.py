"""Trainings of the tests: items, runs of the trainer, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Example, Item
from qrpo_core.training.survival import Outcome
from qrpo_core.training.trainer import QRPOTrainer
from tests.rounding import reordered

#: The fixture `train`: a model's directory and settings of the training.
Train = Callable[..., Outcome]

BETA = 0.5
#: Operations from a weight to a log-prob, and from there to the gradient norm: see test_distributed.
SCORING, GRADIENT = 2_000, reordered(4_000, condition=4)


def simple_examples(count: int, length: int = 12) -> list[Example]:
    draw = np.random.default_rng(0)
    rows = []
    for row in range(count):
        prompt, tokens = (draw.integers(0, 256, size).tolist() for size in (5, length))
        rows.append(Example(prompt, tokens, target=(-1.0) ** row, beta=0.1, ref_logprob=-60.0))
    return rows


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def unknown(items: Sequence[Example]) -> float:
    """How far two computations of one of their log-ratios may lie apart, in nats."""
    return reordered(SCORING) * max(abs(item.ref_logprob) for item in items)


def make_trainer(
    items: Sequence[Item],
    model: Any,
    out: Path,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(beta=BETA),  # noqa: B008
    batch_size: int | None = 4,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    weights_dtype: str = "float32",
    compile: str = "never",
    **settings: Any,
) -> QRPOTrainer:
    known = {"use_cpu": True, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1}
    known |= {"save_strategy": "no", "disable_tqdm": True, "optim": "sgd", "num_train_epochs": 2}
    arguments = TrainingArguments(str(out), **(known | settings))
    made = QRPOTrainer(
        model,
        arguments,
        items,
        objective=objective,
        batch_size=batch_size,
        max_tokens=max_tokens,
        temperature=temperature,
        weights_dtype=weights_dtype,
        compile=compile,
    )
    made.remove_callback(PrinterCallback)
    return made


def run_trainer(items: Sequence[Item], directory: Path, out: Path, **settings: Any) -> QRPOTrainer:
    trainer = make_trainer(items, load(directory), out, **settings)
    trainer.train()
    return trainer


def history(trainer: QRPOTrainer) -> list[dict[str, float]]:
    """What each step logged, without what depends on the machine or on how a step is cut."""
    dropped = ("tokens_per_second", "peak_memory_gb", "shared_prefix_share")
    return [
        {name: value for name, value in entry.items() if name not in dropped}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def history_of(items: Sequence[Item], directory: Path, out: Path, settings: dict[str, Any]) -> Any:
    """`history` of a run with these settings: what another process can be asked for."""
    return history(run_trainer(items, directory, out, **settings))


def assert_same_run(one: QRPOTrainer, other: QRPOTrainer, start: Path) -> None:
    """Each step adds its own difference to the weights, and so to everything that is logged after it.

    The log-ratios of the first step are rounding alone, and so are their signs, which are not compared.
    """
    assert len(history(one)) == len(history(other)) > 0
    for step, (here, there) in enumerate(zip(history(one), history(other), strict=True), 1):
        assert here.keys() == there.keys()
        if "sign_agreement" in here:  # it jumps where rounding decides a sign; log-ratios are compared
            there = there | {"sign_agreement": here["sign_agreement"]}
        assert here == pytest.approx(there, rel=step * GRADIENT, abs=step * GRADIENT)
    weights = [list(trainer.model.parameters()) for trainer in (one, other)]
    moved = distance(weights[0], load(start).parameters())
    assert distance(*weights) <= len(history(one)) * GRADIENT * moved


def distance(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return float(sum(((a.detach() - b.detach()).double() ** 2).sum() for a, b in pairs)) ** 0.5
