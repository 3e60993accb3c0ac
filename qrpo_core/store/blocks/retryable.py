"""Stored rows with a retryable status (a judge was away, say): which of them a run retries.

A block never changes. A retried row is in a further block, of a higher generation. A reader takes a settled
row before a retryable one; of several settled rows the one in the block whose id comes first, and of several
retryable rows the newest. A row that is settled in any block is settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.schemas import RETRYABLE
from qrpo_core.store.blocks.manifest import BlockManifest, RetryableRange
from qrpo_core.store.blocks.planning import RowId, RowRange, Wanted, missing_ranges, ranges_of
from qrpo_core.store.blocks.tables import contains, row_ids


class Attempts(NamedTuple):
    """The attempts at a retryable row: their number, its highest generation, its newest status."""

    tries: int
    generation: int
    status: str


@dataclass(frozen=True)
class MissingRows:
    """The wanted rows that a run asks for, in the order of what is wanted.

    absent : rows that no block has. retried : rows with a retryable status. given_up : rows with a retryable
    status that have used up their tries; a run takes them as they are.
    """

    absent: list[RowRange]
    retried: Mapping[RowId, Attempts]
    given_up: Mapping[RowId, Attempts]

    @property
    def ranges(self) -> list[RowRange]:
        """All rows that a run asks for."""
        return [*self.absent, *ranges_of_ids(self.retried)]

    @property
    def row_count(self) -> int:
        """The number of rows that a run asks for."""
        return sum(each.count for each in self.absent) + len(self.retried)


def retryable_rows(committed: Sequence[BlockManifest]) -> dict[RowId, Attempts]:
    """The rows that have a retryable status in every block that has them."""
    found: dict[RowId, Attempts] = {}
    blocks = [block for block in committed if block.retryable]
    for block in sorted(blocks, key=lambda block: block.generation):
        for row, tries, status in _rows(block):
            before = found.get(row)
            found[row] = Attempts(tries + (before.tries if before else 0), block.generation, status)
    if not found:
        return {}
    indices = _by_key(found)
    for block in committed:
        if indices.keys().isdisjoint(block.ranges.keys):
            continue
        own = {row for row, _, _ in _rows(block)}
        for each in block.ranges:
            for index in indices.get(each.key, ()):
                if each.first <= index < each.first + each.count and (each.key, index) not in own:
                    found.pop((each.key, index), None)
    return found


def missing_rows(
    wanted: Wanted, committed: Sequence[BlockManifest], most: int, before: Mapping[RowId, int]
) -> MissingRows:
    """The wanted rows that a run asks for.

    most : the number of tries after which a row is no longer retried. before : the tries of each row when the
    run began. A row that has been tried in this run waits for the next.
    """
    rows = retryable_rows(committed)
    rows = {row: attempts for row, attempts in rows.items() if row[1] in wanted.get(row[0], ())}
    if rows:
        place = {key: number for number, key in enumerate(wanted)}
        rows = dict(sorted(rows.items(), key=lambda item: (place[item[0][0]], item[0][1])))
    retried = {
        row: attempts
        for row, attempts in rows.items()
        if attempts.tries < most and attempts.tries <= before.get(row, 0)
    }
    given_up = {row: attempts for row, attempts in rows.items() if attempts.tries >= most}
    return MissingRows(missing_ranges(wanted, committed), retried, given_up)


def retryable_ranges(table: pa.Table, tries: Mapping[RowId, int]) -> list[RetryableRange]:
    """The rows of a block's table that have a retryable status. tries : of rows that were tried before."""
    if "status" not in table.column_names:
        return []
    table = table.filter(pc.is_in(table["status"], pa.array(RETRYABLE)))
    entries: list[RetryableRange] = []
    for row, status in zip(row_ids(table), table["status"].to_pylist(), strict=True):
        (key, index), about = row, (tries.get(row, 1), status)
        last = entries[-1] if entries else None
        if last and (last.key, last.first + last.count, (last.tries, last.status)) == (key, index, about):
            entries[-1] = last._replace(count=last.count + 1)
        else:
            entries.append(RetryableRange(key, index, 1, *about))
    return entries


def settled_first(tables: Sequence[pa.Table], blocks: Sequence[BlockManifest]) -> pa.Table:
    """The rows of blocks in the order in which a reader takes the first: settled ones, then the newest."""
    settled: list[pa.Table] = []
    others: list[tuple[int, pa.Table]] = []
    for table, block in zip(tables, blocks, strict=True):
        if not block.retryable:
            settled.append(table)
            continue
        mask = contains(table, [row for row, _, _ in _rows(block)])
        settled.append(table.filter(pc.invert(mask)))
        others.append((-block.generation, table.filter(mask)))
    others.sort(key=lambda part: part[0])  # stable: of equal ones the block whose id comes first
    return pa.concat_tables([*settled, *(table for _, table in others)])


def ranges_of_ids(rows: Iterable[RowId]) -> list[RowRange]:
    """Rows as ranges of neighbours, by key in the order of their first row."""
    return list(ranges_of({key: sorted(indices) for key, indices in _by_key(rows).items()}))


def count_statuses(rows: Mapping[RowId, Attempts]) -> dict[str, int]:
    """The number of rows with each status, the commonest first."""
    return dict(Counter(attempts.status for attempts in rows.values()).most_common())


def _by_key(rows: Iterable[RowId]) -> dict[str, list[int]]:
    indices: dict[str, list[int]] = {}
    for key, index in rows:
        indices.setdefault(key, []).append(index)
    return indices


def _rows(block: BlockManifest) -> Iterator[tuple[RowId, int, str]]:
    for each in block.retryable:
        for index in range(each.first, each.first + each.count):
            yield (each.key, index), each.tries, each.status
