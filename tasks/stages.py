"""Stages of a run: each looks in the store, computes what is missing there, and says what it did.

Two kinds. A *coarse* stage makes one artifact and is a cached Prefect task whose record lies beside the
artifact: here. A *block* stage plans its missing rows against the store and runs one uncached task a block:
`tasks.blocks`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefect.utilities.annotations import quote

from qrpo_core.config import Experiment
from qrpo_core.preflight import check
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe
from tasks.cache import coarse_task
from tasks.interrupts import interrupts
from tasks.progress import announce


@dataclass(frozen=True)
class Stage:
    """What a stage did.

    reused, computed : rows of a block stage, or 1 artifact of a coarse one.
    state : "Cached" (nothing to do) or "Completed".
    seconds : wall time of the stage in this run.
    """

    stage: str
    reused: int
    computed: int
    state: str
    seconds: float


def workspace_of(experiment: Experiment) -> Workspace:
    """The workspace that the flows of one process share for an experiment, engine included.

    Made once, when everything that is cheap to find wrong has been looked for (a run of a deployment begins
    here), and when it is seen that the store can do what everything rests on: create an object only if there
    is none.
    """
    workspace = _workspace(experiment.model_dump_json())
    workspace.blocks.begin_run()
    return workspace


_passed = ""


def passed(experiment: Experiment) -> None:
    """Note that preflight has let an experiment pass: the flows of this process do not repeat it."""
    global _passed
    _passed = experiment.model_dump_json()


@lru_cache(maxsize=1)
def _workspace(experiment: str) -> Workspace:
    workspace = Workspace(Experiment.model_validate_json(experiment))
    if experiment != _passed:
        check(workspace)
    workspace.objects.check_conditional()
    listen()
    return workspace


def listen() -> None:
    """Let the project's own loggers say what they have to say: Prefect gives them handlers, and no level."""
    logging.getLogger("qrpo").setLevel(logging.INFO)


def make(workspace: Workspace, stage: str, recipe: Recipe, build: Callable[[], Manifest]) -> Stage:
    """A coarse stage: the recipe's artifact, built if the store does not have it."""
    started = time.monotonic()
    bound = coarse_task(_build, workspace.experiment.store, name=stage)
    with interrupts():
        state = bound(recipe=recipe, store=workspace.experiment.store, build=quote(build), return_state=True)
    state.result()  # raises what the task raised
    cached = state.name == "Cached"
    result = Stage(stage, int(cached), int(not cached), state.name, time.monotonic() - started)
    announce(result.stage, result.reused, result.computed, "artifact", result.seconds)
    return result


def _build(recipe: Recipe, store: Any, build: Callable[[], Manifest]) -> str:
    """Body of every coarse task. The result that Prefect keeps is a reference, never data."""
    build()
    return recipe.path
