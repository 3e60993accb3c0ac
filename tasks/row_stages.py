"""Stages that compute rows: they plan the missing rows against the store and compute them in blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.utilities.annotations import quote

from qrpo_core.common.errors import DamagedError
from qrpo_core.pipeline import engine_copy, parity
from qrpo_core.pipeline.first_rows import ROWS, first_rows_steps
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.block_sizes import BlockSizes
from qrpo_core.store.blocks.planning import BlockPlan, count_rows
from tasks.dispatch import Compute, RowsToCompute, rows_to_compute
from tasks.interrupts import reraise_interrupts
from tasks.progress import announce, announce_fact, announce_problem, stage_progress
from tasks.spending import spending
from tasks.stages import Stage, StorePath, artifact_stage

R = TypeVar("R")

#: How often stages run again after a damaged block was quarantined.
_RETRIES = 3


def in_this_run(missing: RowsToCompute) -> int:
    """Compute the missing rows in this process; returns their number.

    Concurrent runs share the blocks; see `BlockSizes`.
    """
    spending.check(missing.step.label)
    workspace, step = missing.workspace, missing.step
    _check_engine(missing)
    computed = _try_reward(missing)
    sizes = BlockSizes(workspace.blocks.config, step.at_once)  # from here on: rows, not loading
    with stage_progress(step.label, missing.count - computed) as advance:
        for number, plan in enumerate(sizes.blocks(workspace.blocks, step.recipe, step.wanted), 1):
            if number > 1:  # so that a run below any cap gets on
                spending.check(step.label)
            _compute(missing, step, f"{step.label}, block {number}", plan, advance)
            computed += plan.rows
    return computed


def row_stage(
    workspace: Workspace,
    step: BlockStep,
    compute: Compute = in_this_run,
    inputs: Sequence[State[StorePath]] = (),
) -> tuple[Stage, State[StorePath]]:
    """Compute the rows that the store lacks; returns the stage's record and the state of its task.

    inputs : results of the stages before it; see `tasks.stages.artifact_stage`.
    """
    started = time.monotonic()
    row_seconds = workspace.blocks.row_seconds(step.recipe)
    missing = RowsToCompute(workspace, step, rows_to_compute(workspace, step), inputs)
    computed = compute(missing) if missing.rows else 0
    computed += workspace.trial_rows.pop(step.recipe.key, 0)
    reused = count_rows(step.wanted) - computed
    with reraise_interrupts():
        state = rows_complete(
            step.label,
            step.recipe.blocks_path,
            reused,
            computed,
            return_state=True,
            wait_for=[*inputs, *missing.states],
        )
    state.result()
    seconds = time.monotonic() - started
    stage = Stage(step.label, reused, computed, state.name, seconds, reused * row_seconds)
    announce(stage.stage, reused, computed, "rows", stage.seconds)
    return stage, state


@task(name="rows", task_run_name="{stage}", cache_policy=NO_CACHE)
def rows_complete(stage: str, path: str, reused: int, computed: int) -> Any:
    """The node of a row stage in the run graph, after its blocks; Cached where the store had every row."""
    return StorePath(path) if computed else Completed(name="Cached", data=StorePath(path))


@task(name="block", task_run_name="{title}", cache_policy=NO_CACHE)
def compute_block(
    title: str, step: BlockStep, plan: BlockPlan, workspace: Workspace, advance: Callable[[int], None]
) -> StorePath:
    """Compute one block and commit it; returns its place in the store."""
    started = time.monotonic()
    table, facts = step.compute(plan, advance)
    block = workspace.blocks.commit(plan, table, step.schema, time.monotonic() - started, **facts)
    return StorePath(f"{step.recipe.blocks_path}/{block.block}")


def retry_damaged(work: Callable[[], R], reset: Callable[[], None] = lambda: None) -> R:
    """The result of `work`. If it meets a damaged block, the block is quarantined and `work` starts over.

    reset : undoes what an attempt noted, before the next one.
    """
    for _ in range(_RETRIES):
        try:
            return work()
        except DamagedError as error:
            announce_problem(f"{error}")
            reset()
    return work()


def _compute(
    missing: RowsToCompute, step: BlockStep, title: str, plan: BlockPlan, advance: Callable[[int], None]
) -> None:
    with reraise_interrupts():
        state = compute_block(
            title,
            quote(step),
            quote(plan),
            quote(missing.workspace),
            advance,
            return_state=True,
            wait_for=list(missing.inputs),
        )
    state.result()
    missing.states.append(state)


def _check_engine(missing: RowsToCompute) -> None:
    """Once for each engine and policy: check that the engine's log-probs agree with the training model's."""
    workspace, step = missing.workspace, missing.step
    copy = engine_copy.engine_copy_of(step)
    if copy is not None and workspace.artifacts.find(copy.recipe) is None:
        _, state = artifact_stage(workspace, copy.label, copy.recipe, copy.build, missing.inputs)
        missing.states.append(state)
        announce_fact(engine_copy.summary(workspace.artifacts.get(copy.recipe).facts))
    comparison = parity.parity_check(step)
    if comparison is None or workspace.artifacts.find(comparison.recipe) is not None:
        return
    with stage_progress(comparison.label, workspace.experiment.parity.rows) as advance:
        build = partial(comparison.build, advance)
        _, state = artifact_stage(workspace, comparison.label, comparison.recipe, build, missing.inputs)
        missing.states.append(state)
    announce_fact(parity.summary(workspace.artifacts.get(comparison.recipe).facts))


def _try_reward(missing: RowsToCompute) -> int:
    """Sample and score a few rows first, if none has been scored; returns how many belong to the step.

    The others go to `Workspace.trial_rows`.
    """
    workspace, step = missing.workspace, missing.step
    few = first_rows_steps(step)
    if not few:
        return 0
    computed: Counter[str] = Counter()
    with stage_progress("try the reward", sum(count_rows(each.wanted) for each in few)) as advance:
        for each in few:
            for plan in workspace.blocks.plan(each.recipe, each.wanted, ROWS):
                _compute(missing, each, each.label, plan, advance)
                computed[each.recipe.key] += plan.rows
    own = computed.pop(step.recipe.key, 0)
    workspace.trial_rows.update(computed)  # their own stage counts them
    return own
