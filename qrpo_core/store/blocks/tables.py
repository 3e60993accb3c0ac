"""Tables of rows: in the order of a plan, as Parquet, and chosen by row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qrpo_core.common.errors import StoreError
from qrpo_core.store.blocks.planning import STRIDE, BlockPlan, RowId, Wanted

#: Rows of the average stretch from which on slices cost less than copies.
_STRETCH = 64


def in_order(table: pa.Table, plan: BlockPlan, where: str) -> pa.Table:
    """The table's rows in the plan's order; StoreError if they are not exactly the plan's rows."""
    if _is_in_order(table, plan):
        return table
    chosen, absent = select_rows(table, list(plan.row_ids()))
    if absent or len(table) != plan.rows:
        raise StoreError(f"{len(table)} rows were computed where {plan.rows} were planned", where=where)
    return chosen


def to_parquet(table: pa.Table) -> bytes:
    """The table as one Parquet file; equal tables give equal bytes with one version of pyarrow.

    Without statistics and dictionaries, which cost a fifth of the time and serve no reader: a block is found
    through its manifest and read whole, and zstd compresses repetitions.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(), sink, compression="zstd", use_dictionary=False, write_statistics=False
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def from_parquet(data: bytes) -> pa.Table:
    """The table of a Parquet file; ValueError (such as ArrowInvalid) or OSError if it is unreadable."""
    # Without Arrow's threads: the caller reads blocks in parallel, and a process that ends while that pool
    # still winds down may abort (github.com/apache/arrow/issues/34314).
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def select(table: pa.Table, wanted: Wanted) -> pa.Table:
    """The wanted rows, in the order of `wanted` then sample_index, the first of any duplicates."""
    position, index = _positions(table, wanted)
    sizes = np.fromiter(map(len, wanted.values()), np.int64, len(wanted))
    indices = np.fromiter(chain.from_iterable(wanted.values()), np.int64, int(sizes.sum()))
    asked = np.repeat(np.arange(len(sizes)), sizes) * STRIDE + indices
    rows = np.flatnonzero(position >= 0)
    rank, first = np.unique(position[rows] * STRIDE + index[rows], return_index=True)
    return _take(table, rows[first[np.isin(rank, asked, assume_unique=True)]])


def select_rows(table: pa.Table, asked: Sequence[RowId]) -> tuple[pa.Table, list[RowId]]:
    """The asked rows that the table has, in the order of `asked`, and those that it lacks.

    Of duplicate rows the first is taken.
    """
    number = {key: position for position, key in enumerate(dict.fromkeys(key for key, _ in asked))}
    position, index = _positions(table, number)
    rows = np.flatnonzero(position >= 0)
    rank, first = np.unique(position[rows] * STRIDE + index[rows], return_index=True)
    wanted = np.array([number[key] * STRIDE + index for key, index in asked], np.int64)
    place = np.searchsorted(rank, wanted)
    found = place < len(rank)
    found[found] = rank[place[found]] == wanted[found]
    absent = [row for row, there in zip(asked, found.tolist(), strict=True) if not there]
    return _take(table, rows[first[place[found]]]), absent


def first_difference(one: pa.Table, other: pa.Table) -> RowId | None:
    """The first row in which two tables of the same rows in one order differ; None if they are equal."""
    if one.equals(other):
        return None
    for row in range(len(one)):
        if not one.slice(row, 1).equals(other.slice(row, 1)):
            return row_ids(one.slice(row, 1))[0]
    return None


def row_keys(table: pa.Table) -> pa.ChunkedArray:
    """The row key of every row."""
    if "ground_truth_digest" not in table.column_names:
        return table.column("prompt_id")
    digest = table.column("ground_truth_digest")
    joined = pc.binary_join_element_wise(table.column("prompt_id"), digest, ".")
    return pc.if_else(pc.equal(digest, ""), table.column("prompt_id"), joined)


def row_ids(table: pa.Table) -> list[RowId]:
    """(row key, sample_index) of every row."""
    keys, indices = row_keys(table).to_pylist(), table.column("sample_index").to_pylist()
    return list(zip(keys, indices, strict=True))


def contains(table: pa.Table, rows: Collection[RowId]) -> pa.ChunkedArray:
    """Whether each row of the table is among `rows` (boolean)."""
    names = pc.binary_join_element_wise(row_keys(table), table.column("sample_index").cast(pa.string()), ":")
    return pc.is_in(names, value_set=pa.array([f"{key}:{index}" for key, index in rows], pa.string()))


def _is_in_order(table: pa.Table, plan: BlockPlan) -> bool:
    count = np.array([each.count for each in plan.ranges])
    owner = np.repeat(np.arange(len(count)), count)
    if len(owner) != len(table):
        return False
    first = np.array([each.first for each in plan.ranges])
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    if not np.array_equal(table.column("sample_index").to_numpy(), first[owner] + within):
        return False
    keys = pa.array([each.key for each in plan.ranges], pa.string()).take(pa.array(owner))
    return bool(row_keys(table).equals(pa.chunked_array([keys])))


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
