"""Shares: parts of a step's missing rows, each for another machine to compute.

A share is a span of row keys, not a list of rows: small however much is missing, the same whenever it is
looked at, and apart from every other share of its split. Whoever takes one plans what is missing in it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from qrpo_core.engines.base import Progress
from qrpo_core.errors import ConfigError
from qrpo_core.section import Section
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.chain import stored_chain
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockPlan, Run, Wanted
from qrpo_core.store.recipe import Recipe


class Share(Section):
    """A part of a stage's missing rows: those whose key is in [first, end)."""

    stage: str = Field(description="Label of the stage, such as sample references.")
    recipe: str = Field(description="Key of the rows' recipe; a worker that would compute another refuses.")
    first: str = Field("", description="Smallest row key of the share.")
    end: str | None = Field(None, description="Smallest row key beyond the share; null: there is none.")

    def holds(self, key: str) -> bool:
        """Whether the rows of a key are part of the share."""
        return self.first <= key and (self.end is None or key < self.end)


@dataclass(frozen=True)
class PartOfStep:
    """A step that is asked for some of its rows; which ones, a subclass says by `wanted`."""

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


@dataclass(frozen=True)
class ShareStep(PartOfStep):
    """A step that is asked for the rows of a share alone."""

    share: Share

    @property
    def wanted(self) -> Wanted:
        return {key: rows for key, rows in self.step.wanted.items() if self.share.holds(key)}

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """As the step computes them: a row is the same in any share."""
        return self.step.compute(plan, progress)


def split(step: BlockStep, missing: Sequence[Run], count: int) -> list[Share]:
    """At most `count` shares with about as many missing rows each; the rows of a key stay together.

    Together they hold every key, so that what becomes missing meanwhile is in one of them.
    """
    rows: dict[str, int] = {}
    for run in missing:
        rows[run.key] = rows.get(run.key, 0) + run.count
    total, before, bounds = sum(rows.values()), 0, [""]
    for key in sorted(rows):
        # A share begins with the key that is nearest to an equal part of the rows.
        if len(bounds) < count and before and before + rows[key] / 2 > len(bounds) * total / count:
            bounds.append(key)
        before += rows[key]
    ends = [*bounds[1:], None]
    return [
        Share(stage=step.label, recipe=step.recipe.key, first=first, end=end)
        for first, end in zip(bounds, ends, strict=True)
    ]


def step_of(workspace: Workspace, share: Share) -> ShareStep:
    """The step of the first round that a share is part of.

    Raises ConfigError where no stage is called so, or where its rows would be others than were asked for.
    """
    round_ = stored_chain(workspace).first
    steps = {step.label: step for step in (*round_.row_steps, round_.logprobs)}
    if share.stage not in steps:
        raise ConfigError(f"no stage is called {share.stage!r}", remedy=f"one of {', '.join(steps)}")
    step = steps[share.stage]
    if step.recipe.key != share.recipe:
        raise ConfigError(
            f"this worker would compute {step.recipe.key}, and {share.recipe} was asked for",
            where=share.stage,
            remedy="give every worker the same version of this project, the same model and the same data",
        )
    return ShareStep(step, share)
