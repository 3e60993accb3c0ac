"""Block stages: the rows that a stage lacks, planned against the store and computed block by block."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from qrpo_core.errors import DamagedError
from qrpo_core.steps import drawn, parity
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.trial import ROWS, trial
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockPlan, Blocks, Run, Wanted, count_rows
from qrpo_core.store.recipe import Recipe
from tasks.interrupts import interrupts
from tasks.progress import announce, announce_fact, announce_problem, stage_progress
from tasks.stages import Stage, make

#: Computes the missing rows of a step, wherever; returns how many.
Compute = Callable[[Workspace, BlockStep, Sequence[Run]], int]

Ended = TypeVar("Ended")

#: How often a flow run starts over because a damaged block was set aside, before it gives up.
_MENDINGS = 3


def missing_rows(workspace: Workspace, step: BlockStep) -> list[Run]:
    """The rows of a step that are asked for: not in the store, or there with a status that can pass."""
    return workspace.blocks.lacking(step.recipe, step.wanted).runs


def in_this_run(workspace: Workspace, step: BlockStep, missing: Sequence[Run]) -> int:
    """Compute the missing rows in this process; returns how many.

    Blocks are taken in a random order, and each is looked up once more before it is computed, so that runs
    that work on the same rows at once share them out instead of following each other.
    """
    _pass_gate(workspace, step)
    wanted, computed = step.wanted, _try_reward(workspace, step)
    with stage_progress(step.label, rows_of(missing) - computed) as advance:
        for number, plan in enumerate(_blocks(workspace.blocks, step.recipe, wanted), 1):
            title = f"{step.label}, block {number}"
            with interrupts():
                compute_block(title, quote(step), quote(plan), quote(workspace), advance)
            computed += plan.rows
    return computed


def in_waves(
    workspace: Workspace,
    step: BlockStep,
    missing: Sequence[Run],
    wave: Callable[[Sequence[Run]], Ended],
    judge: Callable[[Ended, int], None],
) -> int:
    """Have missing rows computed elsewhere until none is, as the store has it; returns how many there were.

    wave : has these rows computed and says how those ended who were to do it.
    judge : raises where another wave makes no sense; it is told how many in a row brought no row.
    """
    left, fruitless = missing, 0
    while left:
        ended = wave(left)
        before, left = left, missing_rows(workspace, step)
        fruitless = 0 if rows_of(left) < rows_of(before) else fruitless + 1
        judge(ended, fruitless if left else 0)
    return rows_of(missing)


def rows_of(runs: Iterable[Run]) -> int:
    """How many rows are in these runs of neighbours."""
    return sum(run.count for run in runs)


def fill(workspace: Workspace, step: BlockStep, compute: Compute = in_this_run) -> Stage:
    """A block stage: have the rows computed that are asked for and not in the store."""
    started = time.monotonic()
    missing = missing_rows(workspace, step)
    computed = compute(workspace, step, missing) if missing else 0
    ahead = workspace.ahead.pop(step.recipe.key, 0)
    computed += ahead
    state = "Completed" if missing or ahead else "Cached"
    reused = count_rows(step.wanted) - computed
    result = Stage(step.label, reused, computed, state, time.monotonic() - started)
    announce(result.stage, result.reused, result.computed, "rows", result.seconds)
    return result


def _pass_gate(workspace: Workspace, step: BlockStep) -> None:
    """What is asked once of an engine before it draws: is this the policy, and does it compute what the
    training model computes?"""
    copied = drawn.drawn_copy(step)
    if copied is not None and workspace.artifacts.find(copied.recipe) is None:
        make(workspace, copied.label, copied.recipe, copied.build)
        announce_fact(drawn.summary(workspace.artifacts.get(copied.recipe).facts))
    asked = parity.gate(step)
    if asked is None or workspace.artifacts.find(asked.recipe) is not None:
        return
    with stage_progress(asked.label, workspace.experiment.parity.rows) as advance:
        make(workspace, asked.label, asked.recipe, lambda: asked.build(advance))
    announce_fact(parity.summary(workspace.artifacts.get(asked.recipe).facts))


def _try_reward(workspace: Workspace, step: BlockStep) -> int:
    """Draw and score a few rows first, if none was scored yet; returns how many of them are the step's."""
    few = trial(step)
    if not few:
        return 0
    computed: Counter[str] = Counter()
    with stage_progress("try the reward", sum(count_rows(each.wanted) for each in few)) as advance:
        for each in few:
            for plan in workspace.blocks.plan(each.recipe, each.wanted, ROWS):
                with interrupts():
                    compute_block(each.label, quote(each), quote(plan), quote(workspace), advance)
                computed[each.recipe.key] += plan.rows
    own = computed.pop(step.recipe.key, 0)
    workspace.ahead.update(computed)  # the stage of those rows counts them
    return own


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


@task(name="block", task_run_name="{title}", cache_policy=NO_CACHE)
def compute_block(
    title: str, step: BlockStep, plan: BlockPlan, workspace: Workspace, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Compute one block and commit it; the last step makes it real. Returns a small reference."""
    started = time.monotonic()
    table, facts = step.compute(plan, advance)
    block = workspace.blocks.commit(plan, table, step.schema, time.monotonic() - started, **facts)
    return {"block": block.block, "rows": block.rows, "seconds": block.seconds}
