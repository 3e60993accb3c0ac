"""How many rows the next block has: so few that a killed run has lost little, so many that blocks stay few.

A block is expected to take at most half of the time that the stage has taken so far in this run, and at most
`store.block_minutes`. So a kill loses at most a third of the stage's time, whenever it comes: if the block
began at time s and the kill comes at t <= s + s/2, the loss is t - s <= t/3. Sizes then grow by themselves,
and a stage has few blocks more than its time over `store.block_minutes`.

Only rows of this run say how long a row takes: the store's rows may be from a faster machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from qrpo_core.config import StoreConfig
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.claims import Claims
from qrpo_core.store.blocks.planning import BlockPlan, Wanted
from qrpo_core.store.recipe import Recipe

#: The fewest rows of a block.
FEWEST = 8
#: A block has at most so many times the rows of any before it: few rows say little about many.
_GROWTH = 4


class BlockSizes:
    """The sizes of a stage's blocks in this run. Its clock starts when it is made.

    at_once : rows that are computed at the same time. Fewer would take as long, so no block has fewer.
    clock : seconds, never decreasing.
    """

    def __init__(
        self, config: StoreConfig, at_once: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._clock = config, clock
        self._fewest = max(FEWEST, at_once)
        self._started = clock()
        self._rate: float | None = None
        self._largest = 0

    def rows(self) -> int:
        """Rows of a block that begins now."""
        rows = 0
        if self._rate is not None:
            seconds = min((self._clock() - self._started) / 2, 60 * self._config.block_minutes)
            rows = min(int(self._rate * seconds), _GROWTH * self._largest)
        return min(max(rows, self._fewest), self._config.rows_per_block)

    def blocks(self, blocks: BlockStore, recipe: Recipe, wanted: Wanted) -> Iterator[BlockPlan]:
        """The missing rows of `wanted`, a block at a time; each is computed when the next one is asked for.

        Blocks come in random order, those last that other runs compute at this moment, and each is looked up
        in the store before. They are planned again once their size would double or halve.
        """
        claims = Claims(blocks.objects, recipe)
        try:
            while plans := blocks.plan(recipe, wanted, size := self.rows()):
                random.shuffle(plans)  # a row does not depend on its block or the order
                for plan in _in_turn(blocks, claims, plans):
                    claims.claim(plan)
                    began = self._clock()
                    yield plan
                    self._rate = plan.rows / max(self._clock() - began, 1e-3)
                    self._largest = max(self._largest, plan.rows)
                    if not size / 2 < self.rows() < size * 2:
                        break
        finally:
            claims.release()


def _in_turn(blocks: BlockStore, claims: Claims, plans: Sequence[BlockPlan]) -> Iterator[BlockPlan]:
    """What is still missing and not claimed of each plan; a claimed one only where there is nothing else."""
    claimed: BlockPlan | None = None
    free = 0
    for plan in plans:
        missing = blocks.still_missing(plan)
        if missing is None:
            continue
        if (left := claims.free(missing)) is None:
            claimed = missing
            continue
        free += 1
        yield left
    if claimed is not None and not free and (left := blocks.still_missing(claimed)) is not None:
        yield left  # looked up again: its run may have committed it since
