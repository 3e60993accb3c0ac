"""Shards: parts of a step's missing rows, each for another machine to compute.

A shard is a range of row keys, not a list of rows, so it stays small and does not change as rows are
computed. The shards of a split do not overlap. A worker plans the missing rows of its shard when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.common.progress import Progress
from qrpo_core.config.section import Section
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import BlockPlan, RowRange, Wanted
from qrpo_core.store.recipe import Recipe


class Shard(Section):
    """A part of a stage's missing rows: those whose key is in [first, end)."""

    stage: str = Field(description="Label of the stage, such as sample references.")
    recipe: str = Field(description="Key of the rows' recipe; a worker that would compute another refuses.")
    first: str = Field("", description="Smallest row key of the shard.")
    end: str | None = Field(None, description="Smallest row key beyond the shard; null: there is none.")

    def holds(self, key: str) -> bool:
        """Whether the rows of a key are part of the shard."""
        return self.first <= key and (self.end is None or key < self.end)


@dataclass(frozen=True)
class PartOfStep:
    """A step restricted to some of its rows; subclasses define `wanted`."""

    step: BlockStep

    @property
    def recipe(self) -> Recipe:
        return self.step.recipe

    @property
    def schema(self) -> pa.Schema:
        return self.step.schema

    @property
    def label(self) -> str:
        return self.step.label

    @property
    def at_once(self) -> int:
        return self.step.at_once


@dataclass(frozen=True)
class ShardStep(PartOfStep):
    """A step restricted to the rows of a shard."""

    shard: Shard

    @property
    def wanted(self) -> Wanted:
        return {key: rows for key, rows in self.step.wanted.items() if self.shard.holds(key)}

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """The rows as the step computes them: a row is the same in any shard."""
        return self.step.compute(plan, progress)


def split(step: BlockStep, missing: Sequence[RowRange], count: int) -> list[Shard]:
    """At most `count` shards with about as many missing rows each; the rows of a key stay together.

    Together they hold every key, so that what becomes missing meanwhile is in one of them.
    """
    rows: dict[str, int] = {}
    for row_range in missing:
        rows[row_range.key] = rows.get(row_range.key, 0) + row_range.count
    total, before, bounds = sum(rows.values()), 0, [""]
    for key in sorted(rows):
        # A shard begins with the key that is nearest to an equal part of the rows.
        if len(bounds) < count and before and before + rows[key] / 2 > len(bounds) * total / count:
            bounds.append(key)
        before += rows[key]
    ends = [*bounds[1:], None]
    return [
        Shard(stage=step.label, recipe=step.recipe.key, first=first, end=end)
        for first, end in zip(bounds, ends, strict=True)
    ]


def step_of(workspace: Workspace, shard: Shard) -> ShardStep:
    """The step that a shard is part of, of any round and of the evaluation.

    Raises ConfigError where no stage has the shard's name, or where this worker's recipe differs from the one
    in the shard.
    """
    known = []
    for step in _row_steps(stored_steps(workspace)):
        if step.label == shard.stage:
            break
        known.append(step.label)
    else:
        raise ConfigError(f"no stage is called {shard.stage!r}", remedy=f"one of {', '.join(known)}")
    if step.recipe.key != shard.recipe:
        raise ConfigError(
            f"this worker would compute {step.recipe.key}, and {shard.recipe} was asked for",
            where=shard.stage,
            remedy="give every worker the same version of this project, the same model and the same data",
        )
    return ShardStep(step, shard)


def _row_steps(steps: ExperimentSteps) -> Iterator[BlockStep]:
    """Every step with rows that the store knows enough of, in the order of the run."""
    for round_ in steps.planned_rounds():
        yield from (*round_.row_steps, *round_.logprob_steps)
    yield from steps.before
    try:
        for benchmark in steps.benchmarks:
            yield from (benchmark.before.samples, benchmark.before.rewards)
        end = steps.after(steps.last())
    except MissingError:  # not prepared, or not trained
        return
    yield from (*end.after, *end.divergence)
    for found in end.benchmarks:
        yield from (found.after.samples, found.after.rewards)
