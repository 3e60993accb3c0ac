"""The rows of blocks. A block whose data is damaged is set aside, and said with its rows."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

import pyarrow as pa

from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.ids import digest_bytes
from qrpo_core.records import check_table
from qrpo_core.store.block_manifest import BlockManifest
from qrpo_core.store.checks import Check, Verify, is_checked
from qrpo_core.store.index import BlockIndex
from qrpo_core.store.passing import settled_first
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.tables import from_parquet

#: Blocks read side by side: each is held in memory, and what takes long is to decode it.
_THREADS = min(8, 2 * (os.cpu_count() or 1))
#: Times that a read lists the index before it gives up on blocks that come and go.
_LISTINGS = 5
_ROWS_NAMED = 3


class BlockData:
    """Reads the data objects of the blocks of an index, checked as `verify` says."""

    def __init__(self, index: BlockIndex, verify: Verify) -> None:
        self.index = index
        self.verify = verify

    def rows(self, recipe: Recipe, keys: Set[str], schema: pa.Schema) -> pa.Table:
        """Every row of the blocks that hold one of the row keys, those first that a reader takes.

        A block that is gone because it was compacted is no damage: the index is listed again. DamagedError
        where content is lost, once the blocks are set aside.
        """
        tables: dict[str, pa.Table] = {}
        for _ in range(_LISTINGS):
            blocks, failed = self._read(tables, recipe, keys, schema)
            lost = [(block, why) for block, why in failed if self.index.holds(block)]
            if lost:
                raise self.set_aside(lost)
            if not failed:
                found = [tables[block.index] for block in blocks]
                return settled_first(found, blocks) if found else schema.empty_table()
        raise StoreError(
            f"blocks of {recipe.step} come and go while they are read",
            where=f"{self.index.objects.url}/{recipe.blocks_path}",
            remedy="run again when nobody compacts them",
        )

    def fetch(self, block: BlockManifest, *, check: bool) -> pa.Table:
        """The rows of one block; MissingError or DamagedError says what is wrong with it.

        check : compare the content with its digest; length and number of rows are compared in any case.
        """
        why = _damage(block, data := self.index.objects.read(block.file), check)
        if why:  # once more: the bytes may have been hurt on their way here
            why = _damage(block, data := self.index.objects.read(block.file), check)
        if not why:
            try:
                table = from_parquet(data)
                if len(table) == block.rows:
                    return table
                why = f"{len(table)} rows instead of {block.rows}"
            except (OSError, ValueError, pa.ArrowException) as error:
                why = f"unreadable Parquet: {error}"
        raise DamagedError(why, where=f"{self.index.objects.url}/{block.file}")

    def check(self, entry: str) -> Check | None:
        """One block against its digest, by the object key of its manifest; None if it has gone meanwhile."""
        try:
            block = self.index.read(entry)
        except MissingError:
            return None
        except DamagedError as error:
            return Check(entry, 0, 0, error.message, None)
        why = ""
        try:
            self.fetch(block, check=True)
        except (MissingError, DamagedError) as error:
            if not self.index.holds(block):
                return None
            why = _reason(error)
        return Check(entry, block.rows, block.bytes, why, block)

    def set_aside(self, lost: Sequence[tuple[BlockManifest, str]]) -> DamagedError:
        """Set damaged blocks aside; returns the error that says so, with their rows."""
        remedy = "run again: only these rows are made again"
        try:
            for block, why in lost:
                self.index.set_aside(block, why)
            state = "are set aside"
        except StoreError as error:
            state = "are lost"
            remedy = f"they could not be set aside ({error.message}): mend that and run again"
        rows = chain.from_iterable(_rows(block) for block, _ in lost)
        first = ", ".join(islice(rows, _ROWS_NAMED))
        count = sum(block.rows for block, _ in lost)
        block, why = lost[0]
        which = f"block {block.block} of {block.step} is" if len(lost) == 1 else f"{len(lost)} blocks are"
        return DamagedError(
            f"{which} damaged ({why}): {count} rows {state}, the first of them {first}",
            where=f"{self.index.objects.url}/{block.file}",
            remedy=remedy,
        )

    def _read(
        self, tables: dict[str, pa.Table], recipe: Recipe, keys: Set[str], schema: pa.Schema
    ) -> tuple[list[BlockManifest], list[tuple[BlockManifest, str]]]:
        """Read the blocks that hold one of the keys and are not in `tables` into it, by their index entry.

        Returns the blocks, and those that failed, and why. Data is read while manifests are still coming.
        """

        def one(block: BlockManifest) -> str:
            try:
                table = self.fetch(block, check=is_checked(self.verify, block.block))
            except (MissingError, DamagedError) as error:
                return _reason(error)
            tables[block.index] = check_table(table, schema, block.file)
            return ""

        blocks: list[BlockManifest] = []
        reading: list[tuple[BlockManifest, Future[str]]] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for block in self.index.stream(recipe):
                if keys.isdisjoint(block.runs.keys):
                    continue
                blocks.append(block)
                if block.index not in tables:
                    reading.append((block, pool.submit(one, block)))
        return blocks, [(block, why) for block, done in reading if (why := done.result())]


def _damage(block: BlockManifest, data: bytes, check: bool) -> str:
    if len(data) != block.bytes:
        return f"{len(data)} bytes instead of {block.bytes}"
    return "content and digest differ" if check and digest_bytes(data) != block.digest else ""


def _reason(error: StoreError) -> str:
    return "its data object is gone" if isinstance(error, MissingError) else error.message


def _rows(block: BlockManifest) -> list[str]:
    """The first rows of a block, as they are named in messages."""
    named = (f"{run.key}:{run.first + offset}" for run in block.runs for offset in range(run.count))
    return list(islice(named, _ROWS_NAMED))
