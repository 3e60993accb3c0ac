"""Rows for tests of the store, known in advance so that every loss and mix-up is seen, and a sudden death."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.planning import BlockPlan, Wanted
from qrpo_core.store.recipe import Recipe

RECIPE = Recipe("logprob", 1, {"precision": "fp32"}, {"policy": "p"})


def rows(pairs: Sequence[tuple[str, int]], value: float = 0.0) -> pa.Table:
    """LOGPROBS rows: the log-prob of (key, index) is value - index."""
    return pa.table(
        {
            "prompt_id": [key for key, _ in pairs],
            "sample_index": pa.array([index for _, index in pairs], pa.int32()),
            "logprob": [value - index for _, index in pairs],
            "num_tokens": pa.array([1] * len(pairs), pa.int32()),
        }
    )


def commit(blocks: BlockStore, plan: BlockPlan, value: float = 0.0, **facts: Any) -> BlockManifest:
    """Compute a plan's rows, in another order than planned, and commit them."""
    table = rows(list(plan.row_ids())[::-1], value)
    return blocks.commit(plan, table, LOGPROBS, 0.1, **facts)


def fill(blocks: BlockStore, wanted: Wanted, rows_per_block: int = 4, **facts: Any) -> int:
    """Compute and commit what is missing; returns the rows that were."""
    plans = blocks.plan(RECIPE, wanted, rows_per_block)
    for plan in plans:
        commit(blocks, plan, **facts)
    return sum(plan.rows for plan in plans)


def read(blocks: BlockStore, wanted: Wanted) -> pa.Table:
    """The rows of `wanted`."""
    return blocks.read(RECIPE, wanted, LOGPROBS)


class Killed(BaseException):
    """What a SIGKILL is to the code that it stops."""


class Dying:
    """A back end that stops its process at the nth change."""

    def __init__(self, objects: Objects, changes: int) -> None:
        self.objects, self.left = objects, changes

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.objects, name)
        if name not in ("write", "put_if_absent", "delete"):
            return verb

        def dying(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return verb(*arguments)

        return dying
