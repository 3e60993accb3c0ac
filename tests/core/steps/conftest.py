"""A small experiment on the two-layer model, and the pre-computation of it without Prefect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.experiments import parse_experiment
from qrpo_core.steps import prompts
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.rounds import Round
from qrpo_core.steps.workspace import Workspace


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
            "reference_field": "answer",
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
    logprobs = round_.logprobs
    computed[logprobs.label] = fill(workspace, logprobs)
    round_.build_training_set()
    return computed


def precompute(experiment: Experiment) -> tuple[Chain, dict[str, int]]:
    """Every step before training, and how many rows each had to compute."""
    workspace = Workspace(experiment)
    prompts.build(workspace, prompts.recipe(workspace))
    chain = stored_chain(workspace)
    return chain, prepare(workspace, chain.first)


class Steps:
    """The helpers above, for tests that cannot import a conftest."""

    write_questions = staticmethod(write_questions)
    changed = staticmethod(changed)
    fill = staticmethod(fill)
    prepare = staticmethod(prepare)
    precompute: Callable[[Experiment], tuple[Chain, dict[str, int]]] = staticmethod(precompute)


@pytest.fixture(scope="session")
def steps() -> type[Steps]:
    return Steps
