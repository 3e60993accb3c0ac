"""Blocks: immutable Parquet objects holding the rows of a known list of (row key, sample_index).

Layout below ``blocks/<step>/<key>/``: ``rows/<digest>.parquet`` is the data, named by content;
``index/<block id>.json`` is the manifest, whose conditional creation makes the block real; ``recipe.json``
says what the key stands for. Planning lists the index once, subtracts what is committed from what is asked,
and packs only the missing rows.

Two blocks may hold the same row: two runs with other budgets overlapped, a compaction was cut off, or the row
had a status that can pass and was tried again (`store.passing`). The row is then that of the block whose id
comes first, for every reader, of the blocks in which it is settled if there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from qrpo_core.config import StoreConfig
from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.ids import canonical_json, digest_bytes
from qrpo_core.records import check_table
from qrpo_core.store.aside import Aside, list_aside
from qrpo_core.store.block_data import BlockData
from qrpo_core.store.block_manifest import BlockManifest, make_manifest, to_json
from qrpo_core.store.checks import Check
from qrpo_core.store.compaction import Compaction, compact
from qrpo_core.store.index import BlockIndex
from qrpo_core.store.interface import Objects
from qrpo_core.store.passing import (
    Lacking,
    Pair,
    Tried,
    count_statuses,
    lacking,
    passing_of,
    passing_rows,
    runs_of_pairs,
)
from qrpo_core.store.planning import (
    BlockPlan,
    Run,
    Runs,
    Wanted,
    count_rows,
    missing_runs,
    pack,
    row_key,
    subtract,
)
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.tables import first_difference, in_order, select, select_pairs, to_parquet

__all__ = [
    "Aside",
    "BlockManifest",
    "BlockPlan",
    "Blocks",
    "Check",
    "Compaction",
    "Lacking",
    "Pair",
    "Run",
    "Runs",
    "Tried",
    "Wanted",
    "count_rows",
    "count_statuses",
    "missing_runs",
    "pack",
    "row_key",
]

_DEFAULTS = StoreConfig()

#: Rows of a block while nothing is known of how long a row takes, and the fewest that a rate may suggest.
_UNMEASURED, _FEWEST = 64, 16
_THREADS = 8
#: Times that a commit comes back to an entry that vanishes while it is looked at.
_ATTEMPTS = 5


class Blocks:
    """Plans, commits and reads the blocks of recipes on a back end.

    config : how large blocks are to be, and how far content is checked on read.
    """

    def __init__(self, objects: Objects, config: StoreConfig = _DEFAULTS) -> None:
        self.objects = objects
        self.config = config
        self._index = BlockIndex(objects)
        self._data = BlockData(self._index, config.verify)
        self._named: set[str] = set()
        self._before: dict[str, dict[Pair, int]] = {}

    def begin_run(self) -> None:
        """Let the run that begins now ask again for rows whose status can pass, each once."""
        self._before.clear()

    def committed(self, recipe: Recipe) -> list[BlockManifest]:
        """Every committed block of a recipe, by block id.

        One listing, then the manifests that are new to this process. One that cannot be read is set aside and
        logged (logger ``qrpo.store``): its rows are missing again.
        """
        return self._index.committed(recipe)

    def all_recipes(self) -> list[Recipe]:
        """Every recipe that has blocks, by step and key."""
        return self._index.recipes("blocks/")

    def recipes(self, step: str) -> list[dict[str, Any]]:
        """Every recipe that has blocks of a step, as its `to_dict`."""
        return [recipe.to_dict() for recipe in self._index.recipes(f"blocks/{step}/")]

    def measured(self, recipe: Recipe) -> float | None:
        """Rows a second of this very recipe, over the newest blocks known; None where there are none."""
        return self._index.measured(recipe)

    def rate(self, recipe: Recipe) -> float | None:
        """Rows a second to expect: as `measured`, else of the step's other recipes; None without any."""
        found = self.measured(recipe)
        return self._index.measured_step(recipe.step) if found is None else found

    def rows_for(self, recipe: Recipe) -> int:
        """Rows of a block that is to hold ``block_minutes`` of work.

        Only this recipe's own rate says how long a row takes: another's may be that of another model.
        """
        rate = self.measured(recipe)
        rows = _UNMEASURED if rate is None else max(_FEWEST, int(rate * 60 * self.config.block_minutes))
        return min(rows, self.config.rows_per_block)

    def plan(self, recipe: Recipe, wanted: Wanted, rows_per_block: int) -> list[BlockPlan]:
        """The missing rows of `wanted`, packed in its order into blocks of at most `rows_per_block`.

        Those that are tried again come last, apart from the others.
        """
        committed = self.committed(recipe)
        seen = frozenset(block.index for block in committed)
        left = self._lacking(recipe, wanted, committed)
        plans = list(pack(recipe, left.absent, rows_per_block, seen))
        for generation in sorted({tried.generation for tried in left.again.values()}):
            pairs = [pair for pair, tried in left.again.items() if tried.generation == generation]
            plans += pack(recipe, runs_of_pairs(pairs), rows_per_block, seen, generation + 1)
        return plans

    def lacking(self, recipe: Recipe, wanted: Wanted) -> Lacking:
        """What a run asks for of these rows: those that no block has, and those that it tries again."""
        return self._lacking(recipe, wanted, self.committed(recipe))

    def passing(self, recipe: Recipe) -> dict[Pair, Tried]:
        """Every row whose status can pass, whether it is tried again or not."""
        return passing_rows(self.committed(recipe))

    def still_missing(self, plan: BlockPlan) -> BlockPlan | None:
        """The part of a plan that nobody has committed since; None if nothing is left.

        The plan's own block is asked for by key, so that a listing that lags does not buy it twice.
        """
        if self._index.find(plan) is not None:
            return None
        keys = {run.key for run in plan.runs}
        new = self._index.stream(plan.recipe, besides=plan.seen)
        rivals = (block for block in new if not keys.isdisjoint(block.runs.keys))
        left = tuple(subtract(Runs(plan.runs), rivals))
        if left == plan.runs:
            return plan
        return replace(plan, runs=left) if left else None

    def commit(
        self, plan: BlockPlan, table: pa.Table, schema: pa.Schema, seconds: float, **facts: Any
    ) -> BlockManifest:
        """Write a block's rows and make them real in one conditional step.

        The table must hold exactly the plan's rows (any order). `seconds` and `facts` (engine, device, ...)
        are remembered with the block, and which of its rows have a status that can pass
        (`records.RETRYABLE`), so that another run asks for them again. Two who commit the same rows end with
        one block, the first one's. With ``exact=True`` in the facts of both, rows that differ are a
        StoreError; without, rows that others have committed since the plan was made are left out, so that
        nobody sees a row change: the manifest is then that of the rest, or of another's block if there is no
        rest.
        """
        where = f"block {plan.id} of {plan.recipe.step}"
        table = in_order(check_table(table, schema, where), plan, where)
        if facts.get("exact") is not True:
            left = self.still_missing(plan)
            if left is None:
                return self._others(plan)
            table, _ = select_pairs(table, list(left.pairs())) if left is not plan else (table, [])
            plan = left
        return self._store(plan, table, seconds, facts)

    def read(self, recipe: Recipe, wanted: Wanted, schema: pa.Schema) -> pa.Table:
        """Exactly the rows of `wanted`, in its order, each once.

        MissingError says how many are absent; DamagedError which rows were lost with a damaged block: it is
        set aside then, so that the next run makes them again.
        """
        chosen = select(self._data.rows(recipe, wanted.keys(), schema), wanted)
        asked = count_rows(wanted)
        if len(chosen) != asked:
            raise self._absent(recipe, f"{asked - len(chosen)} of {asked} rows of {recipe.step} are")
        return chosen

    def read_pairs(self, recipe: Recipe, pairs: Sequence[tuple[str, int]], schema: pa.Schema) -> pa.Table:
        """The rows of a list of (row key, sample_index), in its order; errors as in `read`."""
        table = self._data.rows(recipe, {key for key, _ in pairs}, schema)
        chosen, absent = select_pairs(table, pairs)
        if absent:
            raise self._absent(recipe, f"row {absent[0][0]}:{absent[0][1]} of {recipe.step} is")
        return chosen

    def verify(self, recipe: Recipe) -> Iterator[Check]:
        """Every block's content against its digest, as read now. Changes nothing."""
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from filter(None, pool.map(self._data.check, self._index.listed(recipe)))

    def set_aside(self, block: BlockManifest | str, why: str) -> str:
        """Take a block out of the index, so that its rows are missing again; its data stays for inspection.

        block : its manifest, or the object key of an index entry that cannot be read.
        Returns the object key of the record (``aside/<step>/<key>/<block id>.json``), "" if it was gone.
        """
        return self._index.set_aside(block, why)

    def aside(self) -> Iterator[Aside]:
        """Everything that was set aside, artifacts included."""
        return list_aside(self.objects)

    def compact(self, recipe: Recipe, rows_per_block: int) -> Compaction:
        """Merge blocks of less than half of `rows_per_block` rows into blocks of at most that many.

        Safe to stop at any point, and while others read and commit. A damaged block is set aside and raised.
        """
        return compact(self._data, self._store, recipe, rows_per_block)

    def _lacking(self, recipe: Recipe, wanted: Wanted, committed: Sequence[BlockManifest]) -> Lacking:
        if recipe.key not in self._before:
            self._before[recipe.key] = {row: tried.tries for row, tried in passing_rows(committed).items()}
        return lacking(wanted, committed, self.config.tries, self._before[recipe.key])

    def _store(
        self,
        plan: BlockPlan,
        table: pa.Table,
        seconds: float,
        facts: dict[str, Any],
        tries: Mapping[Pair, int] | None = None,
    ) -> BlockManifest:
        """tries : of rows that were tried before, where the plan merges their blocks."""
        data = to_parquet(table)
        passing = passing_of(table, tries or {})
        manifest = make_manifest(plan, digest_bytes(data), len(data), seconds, facts, passing)
        self._name(plan.recipe)
        self.objects.write(manifest.file, data)
        for _ in range(_ATTEMPTS):
            if self.objects.create(manifest.index, to_json(manifest)):
                self._index.add(manifest)
                return manifest
            winner = self._index.find(plan)  # None if it was unreadable, or has been set aside since
            if winner is not None and self._agrees(winner, manifest, table):
                return winner
        raise StoreError(
            "a block's manifest is there and not there",
            where=f"{self.objects.url}/{manifest.index}",
            remedy="run again",
        )

    def _agrees(self, winner: BlockManifest, ours: BlockManifest, table: pa.Table) -> bool:
        """Whether the winner of a race can stand for our rows; False if it is damaged and was set aside."""
        if winner.digest == ours.digest or not (winner.exact and ours.exact):
            return True
        try:
            theirs = check_table(self._data.fetch(winner, check=True), table.schema, winner.file)
        except (MissingError, DamagedError) as error:
            self._index.set_aside(winner, error.message)
            return False
        row = first_difference(table, theirs)
        if row is None:  # the same rows, written by another version of pyarrow
            return True
        raise StoreError(
            f"block {ours.block} of {ours.step} came out in two ways, though its step declares that it "
            f"cannot: {winner.file} (digest {winner.digest}, by qrpo {winner.code}) is committed, "
            f"{ours.file} (digest {ours.digest}) was made now; row {row[0]}:{row[1]} is the first to differ",
            where=f"{self.objects.url}/{ours.index}",
            remedy="compare the machines and versions that made them; neither was removed",
        )

    def _others(self, plan: BlockPlan) -> BlockManifest:
        """A block of others that holds rows of a plan none of which is missing."""
        for block in self.committed(plan.recipe):
            if block.index not in plan.seen and tuple(subtract(Runs(plan.runs), [block])) != plan.runs:
                return block
        raise StoreError("blocks come and go while one is committed", remedy="run again")

    def _name(self, recipe: Recipe) -> None:
        """Say once what the recipe's key stands for."""
        entry = f"{recipe.blocks_path}/recipe.json"
        if entry not in self._named:
            if not self.objects.exists(entry):
                self.objects.create(entry, canonical_json(recipe.to_dict()).encode())
            self._named.add(entry)

    def _absent(self, recipe: Recipe, which: str) -> MissingError:
        return MissingError(
            f"{which} not in the store",
            where=f"{self.objects.url}/{recipe.blocks_path}",
            remedy="run the step before (qrpo plan shows what is missing)",
        )
