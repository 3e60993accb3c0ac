"""Training: from the training set to a policy in the store."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qrpo_core.config import TrainingConfig, recipe_fields
from qrpo_core.errors import StoreError
from qrpo_core.steps.policies import Policy, folder_files
from qrpo_core.steps.targets import derive
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest, cache_directory
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.train.run import OnStep

VERSION = 4

#: In a train artifact: training rows and their log-probs (`train.survival.ScoredRows`).
SCORED_ROWS = "scored_rows.json"


def recipe(workspace: Workspace, training_set: Recipe, policy: Policy) -> Recipe:
    """Decided by the training set, the policy, the objective and the optimisation."""
    experiment = workspace.experiment
    config = {
        "objective": recipe_fields(experiment.objective),
        "training": recipe_fields(experiment.training),
        "temperature": experiment.training_temperature,
    }
    return Recipe("train", VERSION, config, {"training_set": training_set.key, "policy": policy.digest})


def optimiser_steps(config: TrainingConfig, rows: int) -> int:
    """How many optimiser steps a run takes; the last one of an epoch may hold fewer rows."""
    return math.ceil(config.epochs * math.ceil(rows / config.batch_size))


def build(
    workspace: Workspace, asked: Recipe, training_set: Manifest, policy: Policy, on_step: OnStep | None = None
) -> Manifest:
    """Commit `policy/` (a directory that from_pretrained loads), `history.json` and SCORED_ROWS.

    Nothing is committed where the training did not survive being saved; the training itself is kept, and the
    next run goes on from there.
    """

    def make(scratch: Path) -> Built:
        from qrpo_core.train.card import model_card
        from qrpo_core.train.run import train_policy

        workspace.close()  # the engine's memory, before the trainer asks for its own
        experiment = workspace.experiment
        data = derive(workspace, training_set)
        items = data.items()
        done = train_policy(
            items,
            policy.directory,
            scratch / "policy",
            objective=experiment.objective,
            training=experiment.training.model_copy(update={"temperature": experiment.training_temperature}),
            work=work_directory(asked),
            on_step=on_step,
        )
        if done.scored is None:
            raise AssertionError("the process that trains here has written and scored the policy")
        saved = done.scored.facts
        (scratch / "policy" / "README.md").write_text(
            model_card(experiment, asked, data.diagnostics, len(items), saved), encoding="utf-8"
        )
        files = folder_files(scratch / "policy") | {
            "history.json": json.dumps(done.history).encode(),
            SCORED_ROWS: done.scored.to_json(),
        }
        facts = {"diagnostics": data.diagnostics, "steps": len(done.history), "rows": len(items)}
        return files, facts | {"saved": saved}

    made = workspace.make(asked, make)
    _clear(work_directory(asked))
    return made


def _clear(work: Path) -> None:
    """Delete what a training kept, now that its policy is committed, or leave it to a run that uses it."""
    from qrpo_core.train.launch import alone

    with contextlib.suppress(StoreError), alone(work / "lock", patience=0):
        shutil.rmtree(work, ignore_errors=True)


def work_directory(asked: Recipe) -> Path:
    """Where a training keeps its checkpoints on this machine, until its policy is committed.

    The same whatever training.save_dtype says: a policy that was refused in one is saved in another.
    """
    trained = {name: value for name, value in asked.config["training"].items() if name != "save_dtype"}
    named = replace(asked, config=asked.config | {"training": trained})
    return cache_directory() / "training" / named.key


def example_count(workspace: Workspace, training_set: Manifest) -> int:
    """How many examples an epoch has."""
    return len(derive(workspace, training_set).items())
