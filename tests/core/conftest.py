"""The pre-computed experiment of steps/conftest.py, also for the tests beside that folder; and more of it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.experiments import parse_experiment
from qrpo_core.inventory.uses import known_chain
from qrpo_core.steps import prompts
from qrpo_core.steps.policies import folder_files
from qrpo_core.steps.workspace import Workspace
from tests.core.stores import REWARD, fill

_spec = importlib.util.spec_from_file_location("steps_conftest", Path(__file__).parent / "steps/conftest.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

settings = _module.settings
steps = _module.steps


@pytest.fixture
def other(settings: dict[str, Any], steps: Any) -> Experiment:
    """The same samples by another reward."""
    return parse_experiment({**settings, "reward": REWARD})


@pytest.fixture
def stages(steps: Any, make_tiny_model: Any, tmp_path: Path) -> Callable[[Experiment], Iterator[str]]:
    """Everything of an experiment but the evaluation, stage by stage; policies are made, not trained."""

    def run(experiment: Experiment) -> Iterator[str]:
        workspace = Workspace(experiment)
        prompts.build(workspace, prompts.recipe(workspace))
        yield "prompts"
        chain = known_chain(workspace)
        for number in range(1, experiment.rounds.count + 1):
            round_ = chain.round(number)
            for step in round_.row_steps:
                fill(workspace, step)
                yield step.label
            round_.build_quantiles()
            yield "quantiles"
            fill(workspace, round_.logprobs)
            round_.build_training_set()
            yield "training set"
            model = make_tiny_model(Path(tempfile.mkdtemp(dir=tmp_path)) / "policy")
            (model / "merges.txt").write_text(f"{round_.train.key}")  # not read; another policy each
            workspace.artifacts.commit(round_.train, folder_files(model), {"rows": 1, "steps": 1}, 0.0)
            yield "train"
        end = chain.after(chain.last())
        for step in (*chain.before, *end.after, *end.divergence):
            fill(workspace, step)
        yield "evaluation's rows"

    return run
