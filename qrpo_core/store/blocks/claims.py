"""Which rows other runs compute at this moment, so that runs at once share the work.

A claim is a hint: rows that another run has claimed come last, and are computed all the same. So a claim that
a killed run has left costs nothing, and no clock decides. ``blocks/<step>/<key>/claims/<name>.json`` holds
the ranges of the block in work of one run. `qrpo gc` deletes what killed runs have left.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

import orjson

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.blocks.planning import BlockPlan, RowRanges, subtract
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class _Claim:
    """The rows of another run's block in work."""

    ranges: RowRanges


class Claims:
    """The claims of one run on rows of a recipe, and of the others."""

    def __init__(self, objects: Objects, recipe: Recipe) -> None:
        self._objects, self._folder = objects, f"{recipe.blocks_path}/claims/"
        self._own = f"{self._folder}{secrets.token_hex(8)}.json"

    def free(self, plan: BlockPlan) -> BlockPlan | None:
        """The part of a plan that no other run has claimed; None if nothing is left."""
        left = tuple(subtract(RowRanges(plan.ranges), self._others()))
        return replace(plan, ranges=left) if left else None

    def claim(self, plan: BlockPlan) -> None:
        """Claim the plan's rows in place of those claimed before."""
        self._objects.write(self._own, orjson.dumps([list(each) for each in plan.ranges]))

    def release(self) -> None:
        """Claim nothing any more. A claim that stays costs nothing, so this raises for no store."""
        with contextlib.suppress(QRPOError):
            self._objects.delete(self._own)

    def _others(self) -> Iterator[_Claim]:
        for entry in self._objects.keys(self._folder):
            if entry == self._own:
                continue
            try:
                yield _Claim(RowRanges(orjson.loads(self._objects.read(entry))))
            except (MissingError, ValueError, TypeError):  # its run is done with it, or it is damaged
                continue
