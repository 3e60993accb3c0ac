"""Reading the rows of blocks. Damaged blocks are quarantined, and the error names their rows."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import pyarrow as pa

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import digest_bytes
from qrpo_core.common.schemas import check_table
from qrpo_core.store.blocks.index import BlockIndex
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.retryable import settled_first
from qrpo_core.store.blocks.tables import from_parquet
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.verification import Check, Verify, is_checked

#: Blocks read in parallel: each is held in memory, and decoding takes most of the time.
_THREADS = min(8, 2 * (os.cpu_count() or 1))
#: How often a read lists the index again because blocks disappeared.
_LISTINGS = 5
_ROWS_NAMED = 3


class BlockData:
    """Reads the data objects of the blocks of an index and verifies as many as `verify` says."""

    def __init__(self, index: BlockIndex, verify: Verify) -> None:
        self.index = index
        self.verify = verify

    def rows(self, recipe: Recipe, keys: Set[str], schema: pa.Schema) -> pa.Table:
        """Every row of the blocks that hold one of the row keys; of duplicates the first is the valid one.

        A block that has disappeared was compacted: the index is then listed again. DamagedError if content is
        lost; its blocks are quarantined.
        """
        tables: dict[str, pa.Table] = {}
        for _ in range(_LISTINGS):
            blocks, failed = self._read(tables, recipe, keys, schema)
            lost = [(block, why) for block, why in failed if self.index.is_current(block)]
            if lost:
                raise self.quarantine(lost)
            if not failed:
                found = [tables[block.manifest_key] for block in blocks]
                return settled_first(found, blocks) if found else schema.empty_table()
        raise StoreError(
            f"blocks of {recipe.step} kept disappearing during the read",
            where=f"{self.index.objects.url}/{recipe.blocks_path}",
            remedy="run again after the compaction",
        )

    def fetch(self, block: BlockManifest, *, check: bool) -> pa.Table:
        """The rows of one block; MissingError or DamagedError if it is gone or damaged.

        check : compare the content with its digest; length and number of rows are always compared.
        """
        why = _damage(block, data := self.index.objects.read(block.file), check)
        if why:  # once more: the bytes may have been damaged on their way here
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
        """Compare one block with its digest, by the object key of its manifest; None if it is gone."""
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
            if not self.index.is_current(block):
                return None
            why = _reason(error)
        return Check(entry, block.rows, block.bytes, why, block)

    def quarantine(self, lost: Sequence[tuple[BlockManifest, str]]) -> DamagedError:
        """Quarantine damaged blocks; returns the error that names their rows."""
        remedy = "run again: only these rows are computed again"
        try:
            for block, why in lost:
                self.index.quarantine(block, why)
            state = "are quarantined"
        except StoreError as error:
            state = "are lost"
            remedy = f"they could not be quarantined ({error.message}): repair that and run again"
        rows = (
            f"{each.key}:{each.first + offset}"
            for block, _ in lost
            for each in block.ranges
            for offset in range(each.count)
        )
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
        """Read the blocks that hold one of the keys into `tables`, by manifest key, unless they are in it.

        Returns the blocks, and those that failed with the reason. Data is read while manifests still arrive.
        """

        def read(block: BlockManifest) -> str:
            try:
                table = self.fetch(block, check=is_checked(self.verify, block.block))
            except (MissingError, DamagedError) as error:
                return _reason(error)
            tables[block.manifest_key] = check_table(table, schema, block.file)
            return ""

        blocks: list[BlockManifest] = []
        reading: list[tuple[BlockManifest, Future[str]]] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for block in self.index.stream(recipe):
                if keys.isdisjoint(block.ranges.keys):
                    continue
                blocks.append(block)
                if block.manifest_key not in tables:
                    reading.append((block, pool.submit(read, block)))
        return blocks, [(block, why) for block, done in reading if (why := done.result())]


def _damage(block: BlockManifest, data: bytes, check: bool) -> str:
    if len(data) != block.bytes:
        return f"{len(data)} bytes instead of {block.bytes}"
    return "content and digest differ" if check and digest_bytes(data) != block.digest else ""


def _reason(error: StoreError) -> str:
    return "its data object is gone" if isinstance(error, MissingError) else error.message
