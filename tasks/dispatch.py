"""The missing rows of a stage, and the loop that has them computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefect.client.schemas.objects import State

from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import RowRange
from tasks.stages import StorePath

Outcome = TypeVar("Outcome")


@dataclass
class RowsToCompute:
    """The rows that a stage computes.

    inputs : results of the stages before it. states : of the task runs that computed rows in this run; the
        stage's own task run follows them in the run graph.
    """

    workspace: Workspace
    step: BlockStep
    rows: Sequence[RowRange]
    inputs: Sequence[State[StorePath]] = ()
    states: list[State[Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return count_in(self.rows)

    def still_missing(self) -> list[RowRange]:
        """Those of the step's rows that the store lacks by now."""
        return rows_to_compute(self.workspace, self.step)


#: Computes missing rows, wherever; returns how many it computed.
Compute = Callable[[RowsToCompute], int]


def rows_to_compute(workspace: Workspace, step: BlockStep) -> list[RowRange]:
    """The rows of a step that the store lacks, or has with a retryable status."""
    return workspace.blocks.missing(step.recipe, step.wanted).ranges


def count_in(ranges: Iterable[RowRange]) -> int:
    """The number of rows in these ranges."""
    return sum(each.count for each in ranges)


def dispatch_until_complete(
    missing: RowsToCompute,
    dispatch: Callable[[Sequence[RowRange]], Outcome],
    check: Callable[[Outcome, int], None],
) -> int:
    """Compute rows remotely, in as many attempts as it takes; returns how many rows there were.

    dispatch : computes these rows remotely and returns each worker's outcome.
    check : raises where another attempt makes no sense. It gets the outcome, and how many attempts in a row
        added no row to the store.
    """
    left, fruitless = missing.rows, 0
    while left:
        outcome = dispatch(left)
        before, left = left, missing.still_missing()
        fruitless = 0 if count_in(left) < count_in(before) else fruitless + 1
        check(outcome, fruitless if left else 0)
    return missing.count
