"""Tables of a block's rows: in the order of a plan, as Parquet, and picked out by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qrpo_core.errors import StoreError
from qrpo_core.store.planning import STRIDE, BlockPlan, Wanted

#: Rows of the average stretch from which on slices cost less than copies.
_STRETCH = 64


def in_order(table: pa.Table, plan: BlockPlan, where: str) -> pa.Table:
    """The table's rows in the plan's order; refuses a table that does not hold exactly the plan's rows."""
    if _is_in_order(table, plan):
        return table
    pairs = list(plan.pairs())
    order = {pair: row for row, pair in enumerate(row_pairs(table))}
    if len(table) != len(pairs) or any(pair not in order for pair in pairs):
        raise StoreError(f"{len(table)} rows were computed where {len(pairs)} were planned", where=where)
    return table.take(pa.array([order[pair] for pair in pairs], pa.int64()))


def to_parquet(table: pa.Table) -> bytes:
    """The table as one Parquet file; equal tables give equal bytes with one version of pyarrow.

    Without statistics and dictionaries, which nobody asks for and which cost a fifth of the time: a block is
    found through its manifest and read whole, and zstd sees what repeats.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(), sink, compression="zstd", use_dictionary=False, write_statistics=False
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def from_parquet(data: bytes) -> pa.Table:
    """The table of a Parquet file; ValueError (of which ArrowInvalid is one) or OSError if it is none."""
    # No threads of Arrow's: the caller reads blocks side by side, and a process that ends while that pool is
    # still winding down may abort (github.com/apache/arrow/issues/34314).
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def select(table: pa.Table, wanted: Wanted) -> pa.Table:
    """The rows asked for, in the order of `wanted` then sample_index, the first of any duplicates."""
    position, index = _positions(table, wanted)
    sizes = np.fromiter(map(len, wanted.values()), np.int64, len(wanted))
    asked_index = np.fromiter(chain.from_iterable(wanted.values()), np.int64, int(sizes.sum()))
    asked = np.repeat(np.arange(len(sizes)), sizes) * STRIDE + asked_index
    rows = np.flatnonzero(position >= 0)
    rank, first = np.unique(position[rows] * STRIDE + index[rows], return_index=True)
    return _take(table, rows[first[np.isin(rank, asked, assume_unique=True)]])


def select_pairs(table: pa.Table, pairs: Sequence[tuple[str, int]]) -> tuple[pa.Table, list[tuple[str, int]]]:
    """The rows of (row key, sample_index) pairs, in their order, and the pairs that are absent.

    The table is that of the pairs that are there; of duplicate rows it takes the first.
    """
    number = {key: position for position, key in enumerate(dict.fromkeys(key for key, _ in pairs))}
    position, index = _positions(table, number)
    rows = np.flatnonzero(position >= 0)
    rank, first = np.unique(position[rows] * STRIDE + index[rows], return_index=True)
    asked = np.array([number[key] * STRIDE + index for key, index in pairs], np.int64)
    place = np.searchsorted(rank, asked)
    there = place < len(rank)
    there[there] = rank[place[there]] == asked[there]
    absent = [pair for pair, found in zip(pairs, there.tolist(), strict=True) if not found]
    return _take(table, rows[first[place[there]]]), absent


def first_difference(one: pa.Table, other: pa.Table) -> tuple[str, int] | None:
    """The first (row key, sample_index) at which two tables of the same rows in one order differ."""
    if one.equals(other):
        return None
    pairs = row_pairs(one)
    for row, pair in enumerate(pairs):
        if not one.slice(row, 1).equals(other.slice(row, 1)):
            return pair
    return None


def row_keys(table: pa.Table) -> pa.ChunkedArray:
    """The row key of every row."""
    if "reference_digest" not in table.column_names:
        return table.column("prompt_id")
    digest = table.column("reference_digest")
    joined = pc.binary_join_element_wise(table.column("prompt_id"), digest, ".")
    return pc.if_else(pc.equal(digest, ""), table.column("prompt_id"), joined)


def _is_in_order(table: pa.Table, plan: BlockPlan) -> bool:
    count = np.array([run.count for run in plan.runs])
    run = np.repeat(np.arange(len(count)), count)
    if len(run) != len(table):
        return False
    first = np.array([run.first for run in plan.runs])
    within = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    if not np.array_equal(table.column("sample_index").to_numpy(), first[run] + within):
        return False
    keys = pa.array([run.key for run in plan.runs], pa.string()).take(pa.array(run))
    return bool(row_keys(table).equals(pa.chunked_array([keys])))


def row_pairs(table: pa.Table) -> list[tuple[str, int]]:
    """(row key, sample_index) of every row."""
    keys, indices = row_keys(table).to_pylist(), table.column("sample_index").to_pylist()
    return list(zip(keys, indices, strict=True))


def _positions(table: pa.Table, keys: Iterable[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row: the position of its key among `keys` (-1 if absent), and its sample_index."""
    value_set = pa.array(list(keys), pa.string())
    found = pc.fill_null(pc.index_in(row_keys(table), value_set=value_set), -1)
    return found.to_numpy().astype(np.int64), table.column("sample_index").to_numpy().astype(np.int64)


def _take(table: pa.Table, rows: NDArray[Any]) -> pa.Table:
    """The rows with these numbers. Long stretches, such as whole blocks, are not copied."""
    if not len(rows):
        return table.slice(0, 0)
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    if len(starts) * _STRETCH > len(rows):
        return table.take(pa.array(rows))
    lengths = np.diff(starts, append=len(rows))
    pieces = zip(rows[starts].tolist(), lengths.tolist(), strict=True)
    return pa.concat_tables([table.slice(first, length) for first, length in pieces])
