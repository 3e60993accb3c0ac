"""The objectives beside QRPO through the real flow, on one pool: only trainings and what follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.result import report_path, result_lines, results
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "tup": {"truncation": 0.4},
    "a_star": {"value_beta": 0.5},
    "best_of_n": {"candidates": 4, "target_clip": 1.0},
}


def test_every_kind_runs_on_the_pool_of_the_first(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.align import align

    words = [f"item {number}" for number in range(14)]
    settings: dict[str, Any] = {
        "name": "kinds",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {"kind": "template", "templates": ["Say {w}"], "words": {"w": words}, "size": 14}
        | {"held_out": 0.4},
        "sampling": {"references_per_prompt": 4, "max_new_tokens": 6},
        "reward": {"kind": "length", "max_words": 1},
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 0.01},
        "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        "store": {"path": str(tmp_path / "store")},
    }
    align(parse_experiment(settings))
    for kind, own in KINDS.items():
        experiment = parse_experiment(settings | {"objective": {"kind": kind} | own})
        announced = {stage.stage: stage.missing for stage in plan(Workspace(experiment))}
        stages = {stage.stage: stage for stage in align(experiment)}
        for stage in ("sample references", "annotate references", "score reference log-probs"):
            assert announced[stage] == stages[stage].computed == 0
        assert announced["train policy"] == stages["train policy"].computed == 1
        workspace = Workspace(experiment)
        made = results(workspace)
        facts = made.train.facts["diagnostics"]
        assert facts["objective"] == kind
        assert made.train.facts["saved"]["share"] == pytest.approx(1, abs=0.01)
        history = json.loads(workspace.artifacts.read(made.train, "history.json"))
        assert all(entry["clipped_steps"] == 1 for entry in history if "loss" in entry)
        card = workspace.artifacts.read(made.train, "policy/README.md").decode()
        assert str(OBJECTIVE_NAMES[kind]) in card
        page = report_path(workspace).read_text(encoding="utf-8")
        assert str(OBJECTIVE_NAMES[kind]) in page.replace("&#39;", "'")
        assert "Steps whose gradient was clipped" in page
        if kind == "best_of_n":
            assert "Completions whose target was cut to it" in page
        text = "\n".join(result_lines(workspace))
        assert f"{OBJECTIVE_NAMES[kind].short} was trained on" in text
        assert ("Normalisation check" in text) == (kind != "a_star")
        assert stored_steps(workspace).first.nothing_to_learn() is None
