"""Training: from the training set to a policy in the store."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qrpo_core.common.cache_directory import TRAININGS, cache_directory
from qrpo_core.common.errors import StoreError
from qrpo_core.common.local_copies import Hold
from qrpo_core.config import TrainingConfig, cache_key_fields
from qrpo_core.pipeline import sampler_logprobs
from qrpo_core.pipeline.policies import Policy, folder_files
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Built, Workspace
from qrpo_core.store.checkpoint_store import CheckpointStore
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.training.run import OnStep

VERSION = 8

_logger = logging.getLogger("qrpo.train")

#: In a train artifact: training rows and their log-probs (`training.survival.LogprobComparison`).
LOGPROB_COMPARISON = "scored_rows.json"


def recipe(workspace: Workspace, training_set: Recipe, policy: Policy) -> Recipe:
    """Decided by the training set, the policy, the objective and the optimisation."""
    experiment = workspace.experiment
    config = {
        "objective": cache_key_fields(experiment.objective),
        "training": cache_key_fields(experiment.training),
        "temperature": experiment.training_temperature,
        "weights_dtype": experiment.training.trained_dtype,
    }
    return Recipe("train", VERSION, config, {"training_set": training_set.key, "policy": policy.digest})


def optimiser_steps(config: TrainingConfig, rows: int) -> int:
    """How many optimiser steps a run takes; the last one of an epoch may hold fewer rows."""
    return math.ceil(config.epochs * math.ceil(rows / config.batch_size))


def build(
    workspace: Workspace,
    train_recipe: Recipe,
    training_set: Manifest,
    policy: Policy,
    on_step: OnStep | None = None,
) -> Manifest:
    """Commit `policy/` (a directory that from_pretrained loads), `history.json` and LOGPROB_COMPARISON.

    Nothing is committed where the training did not survive being saved; the training itself is kept, and the
    next run goes on from there.
    """

    stored = CheckpointStore(workspace.experiment.store, checkpoint_recipe(train_recipe))

    def make(scratch: Path) -> Built:
        from qrpo_core.reporting.model_card import model_card
        from qrpo_core.training.run import train_policy

        workspace.close()  # the engine's memory, before the trainer asks for its own
        experiment = workspace.experiment
        data = derive(workspace, training_set)
        sampler_logprobs.refuse_far(data.compared, experiment.parity.reference_limit)
        items = data.items()
        directory = policy.directory
        with Hold(directory):  # training reads it at its beginning and at its end
            done = train_policy(
                items,
                directory,
                scratch / "policy",
                objective=experiment.objective,
                training=experiment.training.model_copy(
                    update={"temperature": experiment.training_temperature}
                ),
                work=work_directory(train_recipe),
                stored=stored,
                on_step=on_step,
                run_name=f"{experiment.name}-{experiment.objective.kind}-{train_recipe.key[:8]}",
            )
        if done.comparison is None:
            raise AssertionError("the process that trains here has written and scored the policy")
        saved = done.comparison.facts
        (scratch / "policy" / "README.md").write_text(
            model_card(experiment, train_recipe, data.diagnostics, len(items), saved), encoding="utf-8"
        )
        files = folder_files(scratch / "policy") | {
            "history.json": json.dumps(done.history).encode(),
            LOGPROB_COMPARISON: done.comparison.to_json(),
        }
        facts = {"diagnostics": data.diagnostics, "steps": len(done.history), "rows": len(items)}
        return files, facts | {"saved": saved} | workspace.settings_facts

    made = workspace.make(train_recipe, make)
    _clear(work_directory(train_recipe))
    try:
        stored.delete()
    except StoreError as error:
        _logger.warning("checkpoints of a finished training stay in the store, for qrpo gc: %s", error)
    return made


def _clear(work: Path) -> None:
    """Delete what a training kept, now that its policy is committed, or leave it to a run that uses it."""
    from qrpo_core.training.launch import exclusive_lock

    with contextlib.suppress(StoreError), exclusive_lock(work / "lock", patience=0):
        shutil.rmtree(work, ignore_errors=True)


def work_directory(train_recipe: Recipe) -> Path:
    """Where a training keeps its checkpoints on this machine, until its policy is committed."""
    return cache_directory() / TRAININGS / checkpoint_recipe(train_recipe).key


def is_trained_now(train_recipe: Recipe) -> bool:
    """Whether another run on this machine trains this policy at this moment."""
    from qrpo_core.training.launch import is_held

    return is_held(work_directory(train_recipe) / "lock")


def checkpoint_recipe(train_recipe: Recipe) -> Recipe:
    """What a training's checkpoints are named by: its recipe without training.save_dtype.

    A policy that was refused in one is saved in another.
    """
    trained = {name: value for name, value in train_recipe.config["training"].items() if name != "save_dtype"}
    return replace(train_recipe, config=train_recipe.config | {"training": trained})


def example_count(workspace: Workspace, training_set: Manifest) -> int:
    """How many examples an epoch has."""
    return len(derive(workspace, training_set).items())
