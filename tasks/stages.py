"""The common parts of all stages: look in the store, compute what is missing, report.

A stage returns the path of its result in the store. The next stage takes it as an input, from which Prefect
draws the arrows of the run graph. There are two kinds of stage. One that makes a whole artifact
(`artifact_stage`) is a cached Prefect task whose record lies beside the artifact. One that computes rows
(`tasks.row_stages`) plans the missing rows and runs one task for each block of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from prefect.client.schemas.objects import State
from prefect.utilities.annotations import quote

from qrpo_core.config import Experiment
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe
from tasks.cache_policy import artifact_task
from tasks.interrupts import reraise_interrupts
from tasks.progress import announce, show_core_logs
from tasks.stage import Stage


class StorePath(str):
    """Path of a stage's result in the store: artifacts/<step>/<key> or blocks/<step>/<key>.

    A class and not plain text: Prefect finds the arrows of the run graph by the identity of results. Only if
    an object has weak references does Prefect notice that it is gone and another has its address.
    """


def workspace_of(experiment: Experiment) -> Workspace:
    """The workspace of an experiment, engine included, which the flows of one process share.

    Creating it runs preflight and checks that the store supports put_if_absent, which commits rely on.
    """
    text = experiment.model_dump_json()
    workspace = _beside.get(text) or _workspace(text)
    workspace.blocks.begin_run()
    return workspace


_checked = ""

#: Workspaces of variants, by experiment, while `beside` is entered.
_beside: dict[str, Workspace] = {}


@contextmanager
def beside(workspace: Workspace, experiment: Experiment) -> Iterator[Workspace]:
    """While entered, flows of this process find a workspace of the experiment that shares this one's store.

    experiment : differs from the workspace's in its training alone, and has passed the checks.
    """
    text = experiment.model_dump_json()
    own = workspace.beside(experiment)
    _beside[text] = own
    try:
        yield own
    finally:
        del _beside[text]
        own.close()


def is_beside(workspace: Workspace) -> bool:
    """Whether the workspace is a variant's, which `beside` made and which was checked before."""
    return any(workspace is each for each in _beside.values())


def skip_preflight(experiment: Experiment) -> None:
    """Remember that an experiment passed preflight, so that flows of this process do not repeat it."""
    global _checked
    _checked = experiment.model_dump_json()


@lru_cache(maxsize=1)
def _workspace(experiment: str) -> Workspace:
    workspace = Workspace(Experiment.model_validate_json(experiment))
    if experiment != _checked:
        check(workspace)
    workspace.objects.check_conditional()
    show_core_logs()
    return workspace


def artifact_stage(
    workspace: Workspace,
    name: str,
    recipe: Recipe,
    build: Callable[[], Manifest],
    inputs: Sequence[State[StorePath]] = (),
) -> tuple[Stage, State[StorePath]]:
    """Build the artifact of a recipe unless the store has it; returns its record and the task's state.

    inputs : results of the stages before it. They only draw the arrows of the run graph: the recipe names the
        inputs of the artifact.
    """
    started = time.monotonic()
    bound = artifact_task(_build, workspace.experiment.store, name=name, task_run_name=name)
    with reraise_interrupts():
        state = bound(
            recipe=recipe,
            store=workspace.experiment.store,
            build=quote(build),
            return_state=True,
            wait_for=list(inputs),
        )
    state.result()  # raises what the task raised
    cached = state.name == "Cached"
    made = workspace.artifacts.find(recipe) if cached else None
    took = 0.0 if made is None else made.seconds
    stage = Stage(name, int(cached), int(not cached), state.name, time.monotonic() - started, took)
    announce(stage.stage, stage.reused, stage.computed, "artifact", stage.seconds)
    return stage, state


def _build(recipe: Recipe, store: Any, build: Callable[[], Manifest]) -> StorePath:
    """Body of every artifact stage. Prefect stores the returned path."""
    build()
    return StorePath(recipe.path)
