"""The small experiment of small_experiment.py as fixtures; and more of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.in_use import known_steps
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.policies import folder_files
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import settings
from tests.core.stores import REWARD, fill

__all__ = ["settings"]

#: What a training measures of its saved policy, here one that did not move.
SAVED = {"dtype": "float32", "share": None, "largest_difference": 0.0, "rows": 1}


@pytest.fixture
def other(settings: dict[str, Any]) -> Experiment:
    """The same samples by another reward."""
    return parse_experiment({**settings, "reward": REWARD})


@pytest.fixture
def stages(make_tiny_model: Any, tmp_path: Path) -> Callable[[Experiment], Iterator[str]]:
    """Everything of an experiment but the evaluation, stage by stage; policies are made, not trained."""

    def run(experiment: Experiment) -> Iterator[str]:
        workspace = Workspace(experiment)
        prompts.build(workspace, prompts.recipe(workspace))
        yield "prompts"
        steps = known_steps(workspace)
        for number in range(1, experiment.rounds.count + 1):
            round_ = steps.round(number)
            for step in round_.row_steps:
                fill(workspace, step)
                yield step.label
            round_.build_quantiles()
            yield "quantiles"
            fill(workspace, round_.logprobs)
            round_.build_training_set()
            yield "assemble training set"
            model = make_tiny_model(Path(tempfile.mkdtemp(dir=tmp_path)) / "policy")
            (model / "merges.txt").write_text(f"{round_.train_recipe.key}")  # not read; another policy each
            facts = {"rows": 1, "steps": 1, "diagnostics": {"normaliser": "none"}, "saved": SAVED}
            facts |= workspace.settings_facts
            workspace.artifacts.commit(round_.train_recipe, folder_files(model), facts, 0.0)
            yield "train"
        end = steps.after(steps.last())
        for step in (*steps.before, *end.after, *end.divergence):
            fill(workspace, step)
        yield "evaluation's rows"

    return run
