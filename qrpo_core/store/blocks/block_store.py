"""The blocks of a store: immutable Parquet objects, each with the rows of a known list of (row key, index).

Layout below ``blocks/<step>/<key>/``: ``rows/<digest>.parquet`` is the data, named by content.
``index/<block id>.json`` is the manifest, whose conditional creation makes the block real. ``recipe.json``
says what the key stands for; ``announced.json`` names the newest manifests, for runs whose listings lag. A
plan lists the index once, subtracts the committed rows from the wanted ones and packs only the missing rows.

Two blocks may hold the same row: two runs with different budgets overlapped, a compaction was interrupted, or
the row had a retryable status and was computed again (`retryable.py`). Every reader then takes the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import canonical_json, digest_bytes
from qrpo_core.common.schemas import check_table
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.blocks.compaction import Compaction, compact
from qrpo_core.store.blocks.index import BlockIndex
from qrpo_core.store.blocks.manifest import BlockManifest, make_manifest, to_json
from qrpo_core.store.blocks.planning import (
    BlockPlan,
    RowId,
    RowRanges,
    Wanted,
    count_rows,
    pack,
    subtract,
)
from qrpo_core.store.blocks.reading import BlockData
from qrpo_core.store.blocks.retryable import (
    Attempts,
    MissingRows,
    missing_rows,
    ranges_of_ids,
    retryable_ranges,
    retryable_rows,
)
from qrpo_core.store.blocks.tables import first_difference, in_order, select, select_rows, to_parquet
from qrpo_core.store.quarantine import Quarantined, list_quarantined
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.verification import Check

_DEFAULTS = StoreConfig()

_THREADS = 8
#: How often a commit looks again at a manifest that disappears.
_ATTEMPTS = 5


class BlockStore:
    """Plans, commits and reads the blocks of recipes on a back end.

    config : the size of blocks, and how much content is verified on read.
    """

    def __init__(self, objects: Objects, config: StoreConfig = _DEFAULTS) -> None:
        self.objects = objects
        self.config = config
        self._index = BlockIndex(objects)
        self._data = BlockData(self._index, config.verify)
        self._named: set[str] = set()
        self._before: dict[str, dict[RowId, int]] = {}

    def begin_run(self) -> None:
        """Let the run that begins now retry each retryable row once."""
        self._before.clear()

    def committed(self, recipe: Recipe) -> list[BlockManifest]:
        """Every committed block of a recipe, by block id.

        One listing, then the manifests that are new to this process. An unreadable manifest is quarantined
        and logged (logger ``qrpo.store``): its rows are missing again.
        """
        return list(self._index.stream(recipe))

    def all_recipes(self) -> list[Recipe]:
        """Every recipe that has blocks, by step and key."""
        return self._index.recipes("blocks/")

    def recipes(self, step: str) -> list[dict[str, Any]]:
        """Every recipe that has blocks of a step, as its `to_dict`."""
        return [recipe.to_dict() for recipe in self._index.recipes(f"blocks/{step}/")]

    def measured(self, recipe: Recipe) -> float | None:
        """Rows a second of this recipe over its newest blocks; None without blocks."""
        return self._index.measured(recipe)

    def rate(self, recipe: Recipe) -> float | None:
        """Rows a second to expect: over the recipe's newest blocks, else the step's; None without blocks."""
        found = self.measured(recipe)
        return self._index.measured_step(recipe.step) if found is None else found

    def row_seconds(self, recipe: Recipe) -> float:
        """What a stored row of this recipe took, in the mean of all its blocks; 0 without blocks."""
        committed = self.committed(recipe)
        rows = sum(block.rows for block in committed)
        return sum(block.seconds for block in committed) / rows if rows else 0.0

    def plan(self, recipe: Recipe, wanted: Wanted, rows_per_block: int) -> list[BlockPlan]:
        """The missing rows of `wanted`, packed in its order into blocks of at most `rows_per_block`.

        Retried rows come last, in blocks without others.
        """
        committed = self.committed(recipe)
        seen = frozenset(block.manifest_key for block in committed)
        left = self._missing(recipe, wanted, committed)
        plans = list(pack(recipe, left.absent, rows_per_block, seen))
        for generation in sorted({attempts.generation for attempts in left.retried.values()}):
            rows = [row for row, attempts in left.retried.items() if attempts.generation == generation]
            plans += pack(recipe, ranges_of_ids(rows), rows_per_block, seen, generation + 1)
        return plans

    def missing(self, recipe: Recipe, wanted: Wanted) -> MissingRows:
        """The wanted rows that a run asks for: those that no block has, and those that it retries."""
        return self._missing(recipe, wanted, self.committed(recipe))

    def retryable(self, recipe: Recipe) -> dict[RowId, Attempts]:
        """Every row with a retryable status, whether a run retries it or not."""
        return retryable_rows(self.committed(recipe))

    def still_missing(self, plan: BlockPlan) -> BlockPlan | None:
        """The part of a plan that is not committed since; None if nothing is left.

        The plan's own block is looked up by key, so that a lagging listing does not cause it twice.
        """
        if self._index.find(plan) is not None:
            return None
        keys = {each.key for each in plan.ranges}
        new = self._index.stream(plan.recipe, besides=plan.seen)
        rivals = (block for block in new if not keys.isdisjoint(block.ranges.keys))
        left = tuple(subtract(RowRanges(plan.ranges), rivals))
        if left == plan.ranges:
            return plan
        return replace(plan, ranges=left) if left else None

    def commit(
        self, plan: BlockPlan, table: pa.Table, schema: pa.Schema, seconds: float, **facts: Any
    ) -> BlockManifest:
        """Store a block's rows and make them real in one conditional step; returns the committed manifest.

        The table must hold exactly the plan's rows (any order). The manifest keeps `seconds`, `facts`
        (engine, device, ...) and which rows have a retryable status (`schemas.RETRYABLE`). Two commits of the
        same rows end with one block, the first one's.

        With ``exact=True`` in the facts of both, rows that differ are a StoreError. Otherwise rows that
        others have committed since the plan was made are left out, so that no reader sees a row change: the
        manifest returned is that of the remaining rows, or of another's block if none remain.
        """
        where = f"block {plan.id} of {plan.recipe.step}"
        table = in_order(check_table(table, schema, where), plan, where)
        if facts.get("exact") is not True:
            left = self.still_missing(plan)
            if left is None:
                return self._rival(plan)
            if left is not plan:
                table, _ = select_rows(table, list(left.row_ids()))
            plan = left
        return self._store(plan, table, seconds, facts)

    def read(self, recipe: Recipe, wanted: Wanted, schema: pa.Schema) -> pa.Table:
        """Exactly the wanted rows, in the order of `wanted`, each once.

        MissingError gives the number of absent rows. DamagedError names the rows lost with a damaged block;
        the block is then quarantined, so that the next run computes them again.
        """
        chosen = select(self._data.rows(recipe, wanted.keys(), schema), wanted)
        asked = count_rows(wanted)
        if len(chosen) != asked:
            raise self._absent(recipe, f"{asked - len(chosen)} of {asked} rows of {recipe.step} are")
        return chosen

    def read_rows(self, recipe: Recipe, rows: Sequence[RowId], schema: pa.Schema) -> pa.Table:
        """The rows of a list of (row key, sample_index), in its order; errors as in `read`."""
        table = self._data.rows(recipe, {key for key, _ in rows}, schema)
        chosen, absent = select_rows(table, rows)
        if absent:
            raise self._absent(recipe, f"row {absent[0][0]}:{absent[0][1]} of {recipe.step} is")
        return chosen

    def verify(self, recipe: Recipe) -> Iterator[Check]:
        """Compare the content of every block with its digest, as read now. Changes nothing."""
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from filter(None, pool.map(self._data.check, self._index.listed(recipe)))

    def quarantine(self, block: BlockManifest | str, why: str) -> str:
        """Take a block out of the index, so that its rows are missing again; its data stays for inspection.

        block : its manifest, or the object key of an unreadable manifest.
        Returns the object key of the record (``quarantine/<step>/<key>/<block id>.json``), "" if the block is
        gone.
        """
        return self._index.quarantine(block, why)

    def quarantined(self) -> Iterator[Quarantined]:
        """Every quarantined manifest, artifacts included."""
        return list_quarantined(self.objects)

    def compact(self, recipe: Recipe, rows_per_block: int) -> Compaction:
        """Merge blocks of less than half of `rows_per_block` rows into blocks of at most that many.

        Safe to stop at any point, and beside readers and writers. Damaged blocks are quarantined and raised.
        """
        return compact(self._data, self._store, recipe, rows_per_block)

    def _missing(self, recipe: Recipe, wanted: Wanted, committed: Sequence[BlockManifest]) -> MissingRows:
        if recipe.key not in self._before:
            rows = retryable_rows(committed)
            self._before[recipe.key] = {row: attempts.tries for row, attempts in rows.items()}
        return missing_rows(wanted, committed, self.config.tries, self._before[recipe.key])

    def _store(
        self,
        plan: BlockPlan,
        table: pa.Table,
        seconds: float,
        facts: dict[str, Any],
        tries: Mapping[RowId, int] | None = None,
    ) -> BlockManifest:
        """tries : of rows that were tried before, where the plan merges their blocks."""
        data = to_parquet(table)
        retryable = retryable_ranges(table, tries or {})
        manifest = make_manifest(plan, digest_bytes(data), len(data), seconds, facts, retryable)
        self._write_recipe(plan.recipe)
        self.objects.write(manifest.file, data)
        self._index.announce(plan.recipe, manifest.manifest_key)
        for _ in range(_ATTEMPTS):
            if self.objects.put_if_absent(manifest.manifest_key, to_json(manifest)):
                self._index.add(manifest)
                return manifest
            winner = self._index.find(plan)  # None if it was unreadable, or has been quarantined since
            if winner is not None and self._agrees(winner, manifest, table):
                return winner
        raise StoreError(
            "the manifest kept disappearing during commit",
            where=f"{self.objects.url}/{manifest.manifest_key}",
            remedy="run again",
        )

    def _agrees(self, winner: BlockManifest, ours: BlockManifest, table: pa.Table) -> bool:
        """Whether the winner of a race can replace our block; False if it is damaged, now quarantined."""
        if winner.digest == ours.digest or not (winner.exact and ours.exact):
            return True
        try:
            theirs = check_table(self._data.fetch(winner, check=True), table.schema, winner.file)
        except (MissingError, DamagedError) as error:
            self._index.quarantine(winner, error.message)
            return False
        row = first_difference(table, theirs)
        if row is None:  # the same rows, written by another version of pyarrow
            return True
        raise StoreError(
            f"block {ours.block} of {ours.step} has two results, though its step declares that it is exact: "
            f"{winner.file} (digest {winner.digest}, by qrpo {winner.code}) is committed, {ours.file} "
            f"(digest {ours.digest}) was computed now; row {row[0]}:{row[1]} is the first to differ",
            where=f"{self.objects.url}/{ours.manifest_key}",
            remedy="compare the machines and versions that computed them; neither was removed",
        )

    def _rival(self, plan: BlockPlan) -> BlockManifest:
        """The block of another run that already holds this plan's rows."""
        for block in self.committed(plan.recipe):
            left = tuple(subtract(RowRanges(plan.ranges), [block]))
            if block.manifest_key not in plan.seen and left != plan.ranges:
                return block
        raise StoreError("other blocks kept changing during commit", remedy="run again")

    def _write_recipe(self, recipe: Recipe) -> None:
        """Record once what the recipe's key stands for."""
        entry = f"{recipe.blocks_path}/recipe.json"
        if entry not in self._named:
            if not self.objects.exists(entry):
                self.objects.put_if_absent(entry, canonical_json(recipe.to_dict()).encode())
            self._named.add(entry)

    def _absent(self, recipe: Recipe, which: str) -> MissingError:
        return MissingError(
            f"{which} not in the store",
            where=f"{self.objects.url}/{recipe.blocks_path}",
            remedy="run the step before (qrpo plan shows what is missing)",
        )
