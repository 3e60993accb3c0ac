"""docs/reference/metrics.md and docs/how-to/train-from-python.md against what the trainer does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Example, Item, Pair
from qrpo_core.objective_kinds import KINDS as OBJECTIVES
from qrpo_core.training.trainer import QRPOTrainer

DOCS = Path(__file__).parents[3] / "docs"
KINDS = tuple(OBJECTIVES)


def documented() -> dict[str, list[str]]:
    """Heading and names of each section of docs/reference/metrics.md."""
    text = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return {heading: re.findall(r"^\| `(\w+)`", body, re.M) for heading, body in parts}


@pytest.mark.parametrize(
    ("kind", "stored"), [*((kind, True) for kind in KINDS), ("simpo", False), ("sft", False)]
)
def test_names_logged_are_names_documented(tiny_model: Path, tmp_path: Path, kind: Any, stored: bool) -> None:
    """stored : whether the items carry reference log-probs."""
    objective = ObjectiveConfig(kind=kind)
    known = {"ref_logprob": -9.0} if stored else {}
    one, other = Example([1, 2], [3, 4], **known), Example([1, 2], [5], **known)
    item: Item = Pair(one, other) if objective.pairwise else one
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    settings = TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=1, logging_steps=1)
    trainer = QRPOTrainer(model, settings, [item], objective=objective)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    expected = [
        name
        for heading, names in documented().items()
        if f"`{kind}`" in heading or (heading.startswith("Compared") and stored)
        for name in names
    ]
    assert len(expected) == len(set(expected)) >= 8
    assert trainer.state.log_history[0].keys() - {"step"} == set(expected)


# peft asks transformers for a name that is about to go.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_page_of_the_trainer_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    names: dict[str, Any] = {
        "path": tiny_model,
        "prompts": [random.integers(0, 256, size=3 + row % 3).tolist() for row in range(7)],
        "completions": [random.integers(0, 256, size=2 + row % 4).tolist() for row in range(7)],
        "rewards": random.normal(size=7),
        "reference_rewards": random.normal(size=(7, 8)),
        "rows": [
            {
                "prompt": f"Say {n}",
                "completion": str(n),
                "reward": n / 7,
                "reference_rewards": [0.1, 0.5, 0.9],
            }
            for n in range(7)
        ],
    }
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "how-to" / "train-from-python.md").read_text(encoding="utf-8"), re.S
    )
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    text = blocks.pop(0)
    assert len([line for line in text.splitlines() if line]) <= 10
    exec(text, names)
    assert names["trainer"].state.log_history[0]["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    exec(blocks[0], names)
    first = names["trainer"].state.log_history[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert first["target"] == pytest.approx(float(names["targets"].target.mean()))
    exec(blocks[1], names)
    assert np.isfinite(names["of_top_half"].target).all()
    exec(blocks[2], names)
    assert names["kind"] == "a_star"
    assert names["trainer"].state.global_step > 0
    exec(blocks[3], names)
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"
    exec(blocks[4], names)
    assert names["kind"] == "sft"
    assert names["trainer"].state.global_step > 0
