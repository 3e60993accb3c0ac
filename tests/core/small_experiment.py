"""A small experiment on the two-layer model, and the pre-computation of it without Prefect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.workspace import Workspace


def write_questions(path: Path, numbers: list[int]) -> None:
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": n}) + "\n" for n in numbers))


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    write_questions(tmp_path / "questions.jsonl", list(range(12)))
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {
            "kind": "file",
            "path": str(tmp_path / "questions.jsonl"),
            "ground_truth_field": "answer",
            "held_out": 0.3,
        },
        "sampling": {"engine": "fake", "references_per_prompt": 3, "max_new_tokens": 12},
        "reward": {"kind": "length", "max_words": 1},
        "training": {"precision": "fp32", "batch_size": 4},
        "store": {"path": str(tmp_path / "store"), "rows_per_block": 5},
    }


def changed(settings: dict[str, Any], **sections: dict[str, Any]) -> Experiment:
    return parse_experiment(
        {**settings, **{name: settings.get(name, {}) | new for name, new in sections.items()}}
    )


def fill(workspace: Workspace, step: BlockStep) -> int:
    rows = 0
    for each in workspace.blocks.plan(step.recipe, step.wanted, workspace.experiment.store.rows_per_block):
        table, facts = step.compute(each, lambda n: None)
        workspace.blocks.commit(each, table, step.schema, 1.0, **facts)
        rows += each.rows
    return rows


def prepare(workspace: Workspace, round_: Round) -> dict[str, int]:
    """Everything of a round before its training, and how many rows each step had to compute."""
    computed = {step.label: fill(workspace, step) for step in round_.row_steps}
    round_.build_quantiles()
    for step in round_.logprob_steps:
        computed[step.label] = fill(workspace, step)
    round_.build_training_set()
    return computed


def precompute(experiment: Experiment) -> tuple[ExperimentSteps, dict[str, int]]:
    """Every step before training, and how many rows each had to compute."""
    workspace = Workspace(experiment)
    prompts.build(workspace, prompts.recipe(workspace))
    steps = stored_steps(workspace)
    return steps, prepare(workspace, steps.first)
