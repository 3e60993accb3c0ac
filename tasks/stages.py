"""Stages of a run: each looks in the store, computes what is missing there, and says what it did.

Two kinds. A *coarse* stage makes one artifact and is a cached Prefect task whose record lies beside the
artifact. A *block* stage plans its missing rows against the store and runs one uncached task a block.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from qrpo_core.config import Experiment
from qrpo_core.errors import DamagedError
from qrpo_core.preflight import check
from qrpo_core.steps import parity, training
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.rounds import Round
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.blocks import BlockPlan, Blocks, Wanted, count_rows, missing_runs
from qrpo_core.store.recipe import Recipe
from tasks.cache import coarse_task
from tasks.progress import announce, announce_fact, announce_problem, stage_progress

#: How often a flow run starts over because a damaged block was set aside, before it gives up.
_MENDINGS = 3


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
    return _workspace(experiment.model_dump_json())


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
    return workspace


def make(workspace: Workspace, stage: str, recipe: Recipe, build: Callable[[], Manifest]) -> Stage:
    """A coarse stage: the recipe's artifact, built if the store does not have it."""
    started = time.monotonic()
    bound = coarse_task(_build, workspace.experiment.store, name=stage)
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


def fill(workspace: Workspace, step: BlockStep) -> Stage:
    """A block stage: compute the rows that are asked for and not in the store.

    Blocks are taken in a random order, and each is looked up once more before it is computed, so that runs
    that work on the same rows at once share them out instead of following each other.
    """
    started = time.monotonic()
    wanted = step.wanted
    missing = sum(run.count for run in missing_runs(wanted, workspace.blocks.committed(step.recipe)))
    computed = 0
    if missing:
        _pass_gate(workspace, step)
        with stage_progress(step.label, missing) as advance:
            for number, plan in enumerate(_blocks(workspace.blocks, step.recipe, wanted), 1):
                name = f"{step.label}, block {number}"
                compute_block.with_options(task_run_name=name)(
                    quote(step), quote(plan), quote(workspace), advance
                )
                computed += plan.rows
    state = "Completed" if missing else "Cached"
    result = Stage(step.label, count_rows(wanted) - computed, computed, state, time.monotonic() - started)
    announce(result.stage, result.reused, result.computed, "rows", result.seconds)
    return result


def _pass_gate(workspace: Workspace, step: BlockStep) -> None:
    """Compare the engine that draws with the training model, once, before rows are bought from it."""
    asked = parity.gate(step)
    if asked is None or workspace.artifacts.find(asked.recipe) is not None:
        return
    with stage_progress(asked.label, workspace.experiment.parity.rows) as advance:
        make(workspace, asked.label, asked.recipe, lambda: asked.build(advance))
    announce_fact(parity.summary(workspace.artifacts.get(asked.recipe).facts))


def _blocks(blocks: Blocks, recipe: Recipe, wanted: Wanted) -> Iterator[BlockPlan]:
    """The blocks to compute: planned anew while their size is a guess, and after others took some."""
    while plans := blocks.plan(recipe, wanted, blocks.rows_for(recipe)):
        measured = blocks.rate(recipe) is not None
        random.shuffle(plans)  # the order of work alone: a row is the same in any block
        for plan in plans if measured else plans[:1]:
            left = blocks.still_missing(plan)
            if left is not None:
                yield left


def mended(work: Callable[[], list[Stage]]) -> list[Stage]:
    """The stages of `work`, done again where a damaged block was met, since that one is set aside then."""
    for _ in range(_MENDINGS):
        try:
            return work()
        except DamagedError as error:
            announce_problem(f"{error}")
    return work()


def prepare(workspace: Workspace, round_: Round) -> list[Stage]:
    """Everything of a round before its training."""
    return mended(lambda: _prepare(workspace, round_))


def _prepare(workspace: Workspace, round_: Round) -> list[Stage]:
    label = round_.label
    stages = [fill(workspace, step) for step in round_.row_steps]
    stages.append(make(workspace, label("quantiles"), round_.quantiles, round_.build_quantiles))
    stages.append(fill(workspace, round_.logprobs))
    stages.append(make(workspace, label("training set"), round_.training_set, round_.build_training_set))
    return stages


def fit(workspace: Workspace, round_: Round) -> Stage:
    """The training of a round; one that was interrupted goes on from its last checkpoint."""

    def build() -> Manifest:
        data = workspace.artifacts.get(round_.training_set)
        examples = training.example_count(workspace, data)
        steps = training.optimiser_steps(workspace.experiment.training, examples)
        with stage_progress(round_.label("train"), steps, "steps") as advance:
            done = 0

            def on_step(step: int, total: int, logs: dict[str, float]) -> None:
                nonlocal done
                advance(step - done)
                done = step

            return training.build(workspace, round_.train, data, round_.start, on_step)

    return make(workspace, round_.label("train"), round_.train, build)


@task(name="block", cache_policy=NO_CACHE)
def compute_block(
    step: BlockStep, plan: BlockPlan, workspace: Workspace, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Compute one block and commit it; the last step makes it real. Returns a small reference."""
    started = time.monotonic()
    table, facts = step.compute(plan, advance)
    block = workspace.blocks.commit(plan, table, step.schema, time.monotonic() - started, **facts)
    return {"block": block.block, "rows": block.rows, "seconds": block.seconds}
