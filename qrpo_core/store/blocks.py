"""Blocks: immutable Parquet objects holding the rows of a known list of (row key, sample_index).

Layout below ``blocks/<step>/<key>/``: ``rows/<digest>.parquet`` is the data, named by content;
``index/<block id>.json`` is the manifest, whose conditional creation makes the block real. Planning lists
the index once, subtracts what is committed from what is asked, and packs only the missing rows.

A row key is the prompt_id; for rewards it carries the digest of what the prompt is checked against
(`row_key`), so that a changed reference asks for new rewards and for no new samples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qrpo_core import __version__
from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.ids import canonical_json, digest_bytes, digest_json
from qrpo_core.records import check_table
from qrpo_core.store.objects import Objects
from qrpo_core.store.recipe import Recipe

FORMAT = 1

_STRIDE = np.int64(1) << 31  # above every sample_index

#: The sample indices asked for of each row key, increasing; range(n) for the first n.
Wanted = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows first .. first + count - 1 of one row key."""

    key: str
    first: int
    count: int


@dataclass(frozen=True)
class BlockPlan:
    """Rows to compute and commit together. Its id follows from its rows: equal plans race for one block."""

    recipe: Recipe
    runs: tuple[Run, ...]

    @property
    def id(self) -> str:
        return digest_json([self.recipe.key, [[run.key, run.first, run.count] for run in self.runs]])

    @property
    def rows(self) -> int:
        return sum(run.count for run in self.runs)

    def pairs(self) -> Iterator[tuple[str, int]]:
        """(row key, sample_index) of every row, in order."""
        for run in self.runs:
            for index in range(run.first, run.first + run.count):
                yield run.key, index


@dataclass(frozen=True)
class BlockManifest:
    """A committed block: its rows, its data object and how it came about."""

    block: str
    runs: tuple[Run, ...]
    rows: int
    file: str
    digest: str
    bytes: int
    seconds: float
    created: str
    code: str
    facts: dict[str, Any] = field(default_factory=dict)


def count_rows(wanted: Wanted) -> int:
    """How many rows are asked for."""
    return sum(map(len, wanted.values()))


def row_key(prompt_id: str, reference_digest: str = "") -> str:
    """The row key of a prompt, with the digest of its reference where the row depends on it."""
    return f"{prompt_id}.{reference_digest}" if reference_digest else prompt_id


class Blocks:
    """Plans, commits and reads the blocks of recipes on a back end."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._known: dict[str, BlockManifest] = {}  # manifests are immutable, so each is read once

    def committed(self, recipe: Recipe) -> list[BlockManifest]:
        """Every committed block of a recipe, by block id."""
        index = f"{recipe.blocks_path}/index/"
        return [self._manifest(key) for key in self.objects.keys(index)]

    def recipes(self, step: str) -> list[dict[str, Any]]:
        """Every recipe that has blocks of a step, as its `to_dict`."""
        keys = [key for key in self.objects.keys(f"blocks/{step}/") if key.endswith("/recipe.json")]
        return [json.loads(self.objects.read(key)) for key in keys]

    def rate(self, step: str) -> float | None:
        """Rows a second over all blocks of a step, or None where there are none."""
        keys = [key for key in self.objects.keys(f"blocks/{step}/") if "/index/" in key]
        blocks = [self._manifest(key) for key in keys]
        seconds = sum(block.seconds for block in blocks)
        return sum(block.rows for block in blocks) / seconds if seconds > 0 else None

    def plan(self, recipe: Recipe, wanted: Wanted, rows_per_block: int) -> list[BlockPlan]:
        """The missing rows of `wanted`, packed in its order into blocks of at most `rows_per_block`."""
        return list(pack(recipe, missing_runs(wanted, self.committed(recipe)), rows_per_block))

    def commit(
        self, plan: BlockPlan, table: pa.Table, schema: pa.Schema, seconds: float, **facts: Any
    ) -> BlockManifest:
        """Write a block's rows and make them real in one conditional step.

        The table must hold exactly the plan's rows (any order). The loser of a race gets the winner's
        manifest. `seconds` and `facts` (engine, device, ...) are remembered with the block.
        """
        where = f"block {plan.id} of {plan.recipe.step}"
        data = _to_parquet(_in_order(check_table(table, schema, where), plan, where))
        digest = digest_bytes(data)
        file = f"{plan.recipe.blocks_path}/rows/{digest[:32]}.parquet"
        manifest = {
            "format": FORMAT,
            "block": plan.id,
            "runs": [[run.key, run.first, run.count] for run in plan.runs],
            "rows": plan.rows,
            "file": file,
            "digest": digest,
            "bytes": len(data),
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": __version__,
            "facts": facts,
        }
        recipe_key = f"{plan.recipe.blocks_path}/recipe.json"
        if not self.objects.exists(recipe_key):
            self.objects.create(recipe_key, canonical_json(plan.recipe.to_dict()).encode())
        self.objects.write(file, data)
        key = f"{plan.recipe.blocks_path}/index/{plan.id}.json"
        self.objects.create(key, canonical_json(manifest).encode())
        return self._manifest(key)

    def read(self, recipe: Recipe, wanted: Wanted, schema: pa.Schema) -> pa.Table:
        """Exactly the rows of `wanted`, in its order, each once; MissingError says how many are absent."""
        blocks = [block for block in self.committed(recipe) if any(run.key in wanted for run in block.runs)]
        tables = [self._rows(block, schema) for block in blocks]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        chosen = _select(table, wanted)
        asked = count_rows(wanted)
        if len(chosen) != asked:
            raise MissingError(
                f"{asked - len(chosen)} of {asked} rows of {recipe.step} are not in the store",
                where=f"{self.objects.url}/{recipe.blocks_path}",
                remedy="run the step before (qrpo plan shows what is missing)",
            )
        return chosen

    def read_pairs(self, recipe: Recipe, pairs: Sequence[tuple[str, int]], schema: pa.Schema) -> pa.Table:
        """The rows of a list of (row key, sample_index), in its order; MissingError if one is absent."""
        keys = {key for key, _ in pairs}
        blocks = [block for block in self.committed(recipe) if any(run.key in keys for run in block.runs)]
        tables = [self._rows(block, schema) for block in blocks]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        order = _order(table)
        absent = [pair for pair in pairs if pair not in order]
        if absent:
            raise MissingError(
                f"row {absent[0][0]}:{absent[0][1]} of {recipe.step} is not in the store",
                where=f"{self.objects.url}/{recipe.blocks_path}",
                remedy="run the step before (qrpo plan shows what is missing)",
            )
        return table.take(pa.array([order[pair] for pair in pairs], pa.int64()))

    def _rows(self, block: BlockManifest, schema: pa.Schema) -> pa.Table:
        data = self.objects.read(block.file)
        if digest_bytes(data) != block.digest:
            raise DamagedError(
                "content and digest differ",
                where=f"{self.objects.url}/{block.file}",
                remedy=f"delete it and index entry {block.block}.json; its {block.rows} rows are made again",
            )
        return check_table(pq.read_table(pa.BufferReader(data)), schema, block.file)

    def _manifest(self, key: str) -> BlockManifest:
        if key not in self._known:
            self._known[key] = self._read_manifest(key)
        return self._known[key]

    def _read_manifest(self, key: str) -> BlockManifest:
        where = f"{self.objects.url}/{key}"
        try:
            raw = json.loads(self.objects.read(key))
            if raw.pop("format") != FORMAT:
                raise StoreError("block manifest of another format", where=where, remedy="upgrade qrpo")
            raw["runs"] = tuple(Run(*run) for run in raw["runs"])
            return BlockManifest(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"unreadable manifest: {error}", where=where, remedy="delete it; its rows are made again"
            ) from None


def missing_runs(wanted: Wanted, committed: Iterable[BlockManifest]) -> list[Run]:
    """What is asked for and not committed, in the order of `wanted`."""
    present: dict[str, list[Run]] = {}
    for block in committed:
        for run in block.runs:
            if run.key in wanted:
                present.setdefault(run.key, []).append(run)
    missing: list[Run] = []
    for key, rows in wanted.items():
        there = sorted(present.get(key, ()), key=lambda run: run.first)
        for asked in _runs(key, rows):
            missing.extend(_without(asked, there))
    return missing


def _runs(key: str, rows: Sequence[int]) -> Iterator[Run]:
    """Increasing indices as runs of neighbours."""
    if isinstance(rows, range) and rows.step == 1:
        if rows:
            yield Run(key, rows.start, len(rows))
        return
    for _, group in groupby(enumerate(rows), lambda place: place[1] - place[0]):
        neighbours = [index for _, index in group]
        yield Run(key, neighbours[0], len(neighbours))


def _without(asked: Run, there: Sequence[Run]) -> Iterator[Run]:
    """The parts of a run that no run of `there` (by first row) covers."""
    at, end = asked.first, asked.first + asked.count
    for run in there:
        if at < min(run.first, end):
            yield Run(asked.key, at, min(run.first, end) - at)
        at = max(at, run.first + run.count)
    if at < end:
        yield Run(asked.key, at, end - at)


def pack(recipe: Recipe, runs: Iterable[Run], rows_per_block: int) -> Iterator[BlockPlan]:
    """Fill blocks with runs in order, splitting a run where a block is full."""
    block: list[Run] = []
    room = rows_per_block
    for run in runs:
        first, left = run.first, run.count
        while left:
            take = min(left, room)
            block.append(Run(run.key, first, take))
            first, left, room = first + take, left - take, room - take
            if not room:
                yield BlockPlan(recipe, tuple(block))
                block, room = [], rows_per_block
    if block:
        yield BlockPlan(recipe, tuple(block))


def _keys(table: pa.Table) -> pa.ChunkedArray:
    if "reference_digest" not in table.column_names:
        return table.column("prompt_id")
    digest = table.column("reference_digest")
    joined = pc.binary_join_element_wise(table.column("prompt_id"), digest, ".")
    return pc.if_else(pc.equal(digest, ""), table.column("prompt_id"), joined)


def _positions(table: pa.Table, keys: Iterable[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Per row: the position of its key among `keys` (-1 if absent), and its sample_index."""
    value_set = pa.array(list(keys), pa.string())
    found = pc.fill_null(pc.index_in(_keys(table), value_set=value_set), -1)
    return found.to_numpy().astype(np.int64), table.column("sample_index").to_numpy().astype(np.int64)


def _select(table: pa.Table, wanted: Wanted) -> pa.Table:
    """The rows asked for, in the order of `wanted` then sample_index, the first of any duplicates."""
    position, index = _positions(table, wanted)
    sizes = np.fromiter(map(len, wanted.values()), np.int64, len(wanted))
    asked_index = np.fromiter(chain.from_iterable(wanted.values()), np.int64, int(sizes.sum()))
    asked = np.repeat(np.arange(len(sizes)), sizes) * _STRIDE + asked_index
    rows = np.flatnonzero(position >= 0)
    rank = position[rows] * _STRIDE + index[rows]
    rank, first = np.unique(rank, return_index=True)
    kept = np.isin(rank, asked, assume_unique=True)
    return table.take(pa.array(rows[first[kept]]))


def _order(table: pa.Table) -> dict[tuple[str, int], int]:
    """(row key, sample_index) → row number; of duplicates (identical rows in two blocks) the last."""
    keys, indices = _keys(table).to_pylist(), table.column("sample_index").to_pylist()
    return {pair: row for row, pair in enumerate(zip(keys, indices, strict=True))}


def _in_order(table: pa.Table, plan: BlockPlan, where: str) -> pa.Table:
    """The table's rows in the plan's order; refuses a table that does not hold exactly the plan's rows."""
    order = _order(table)
    pairs = list(plan.pairs())
    if len(table) != len(pairs) or any(pair not in order for pair in pairs):
        raise StoreError(f"{len(table)} rows were computed where {len(pairs)} were planned", where=where)
    return table.take(pa.array([order[pair] for pair in pairs], pa.int64()))


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()
