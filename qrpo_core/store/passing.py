"""Rows that are in the store with a status that can pass: which of them a run asks for again.

A block is never changed. A row that is tried again is in a further block, of a higher generation; whoever
reads takes a settled row before one that can still pass, of settled ones that of the block whose id comes
first, and of the others the newest. A row that is settled in any block is settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from qrpo_core.records import RETRYABLE
from qrpo_core.store.block_manifest import BlockManifest, Passing
from qrpo_core.store.planning import Run, Wanted, missing_runs, runs_of
from qrpo_core.store.tables import row_pairs

#: (row key, sample_index)
Pair = tuple[str, int]


class Tried(NamedTuple):
    """How a row that can pass stands: tries so far, the highest generation that has it, its newest status."""

    tries: int
    generation: int
    status: str


@dataclass(frozen=True)
class Lacking:
    """What a run asks for of the rows that are wanted.

    absent : rows that no block has. again : rows with a status that can pass. given_up : such rows that were
    asked for as often as they may. All in the order of what is wanted.
    """

    absent: list[Run]
    again: Mapping[Pair, Tried]
    given_up: Mapping[Pair, Tried]

    @property
    def runs(self) -> list[Run]:
        """All that is asked for."""
        return [*self.absent, *runs_of_pairs(self.again)]

    @property
    def rows(self) -> int:
        """How many rows that are."""
        return sum(run.count for run in self.absent) + len(self.again)


def passing_rows(committed: Sequence[BlockManifest]) -> dict[Pair, Tried]:
    """The rows that can pass in every block that has them."""
    found: dict[Pair, Tried] = {}
    for block in sorted((block for block in committed if block.passing), key=lambda block: block.generation):
        for pair, tries, status in _pairs(block.passing):
            before = found.get(pair)
            found[pair] = Tried(tries + (before.tries if before else 0), block.generation, status)
    if not found:
        return {}
    indices: dict[str, list[int]] = {}
    for key, index in found:
        indices.setdefault(key, []).append(index)
    for block in committed:
        if indices.keys().isdisjoint(block.runs.keys):
            continue
        own = {pair for pair, _, _ in _pairs(block.passing)}
        for run in block.runs:
            for index in indices.get(run.key, ()):
                if run.first <= index < run.first + run.count and (run.key, index) not in own:
                    found.pop((run.key, index), None)
    return found


def lacking(
    wanted: Wanted, committed: Sequence[BlockManifest], most: int, before: Mapping[Pair, int]
) -> Lacking:
    """What is to be asked for.

    most : tries after which a row is taken as it is. before : tries of each row when the run began: one that
    the run itself has tried since waits for the next run.
    """
    passing = {pair: tried for pair, tried in passing_rows(committed).items() if _is_wanted(pair, wanted)}
    if passing:
        place = {key: number for number, key in enumerate(wanted)}
        passing = dict(sorted(passing.items(), key=lambda row: (place[row[0][0]], row[0][1])))
    again = {
        pair: tried
        for pair, tried in passing.items()
        if tried.tries < most and tried.tries <= before.get(pair, 0)
    }
    given_up = {pair: tried for pair, tried in passing.items() if tried.tries >= most}
    return Lacking(missing_runs(wanted, committed), again, given_up)


def passing_of(table: pa.Table, tries: Mapping[Pair, int]) -> list[Passing]:
    """The rows of a block's table whose status can pass. tries : of those that were tried before."""
    if "status" not in table.column_names:
        return []
    statuses = table["status"].to_pylist()
    if not set(RETRYABLE).intersection(statuses):
        return []
    pairs = zip(row_pairs(table), statuses, strict=True)
    found = [(pair, (tries.get(pair, 1), status)) for pair, status in pairs if status in RETRYABLE]
    entries: list[Passing] = []
    for (key, index), about in found:
        last = entries[-1] if entries else None
        if last and (last.key, last.first + last.count, (last.tries, last.status)) == (key, index, about):
            entries[-1] = last._replace(count=last.count + 1)
        else:
            entries.append(Passing(key, index, 1, *about))
    return entries


def settled_first(tables: Sequence[pa.Table], blocks: Sequence[BlockManifest]) -> pa.Table:
    """The rows of blocks in the order in which a reader takes the first: settled ones, then the newest."""
    settled: list[pa.Table] = []
    others: list[tuple[int, pa.Table]] = []
    for table, block in zip(tables, blocks, strict=True):
        if not block.passing:
            settled.append(table)
            continue
        own = {pair for pair, _, _ in _pairs(block.passing)}
        mask = pa.array([pair in own for pair in row_pairs(table)], pa.bool_())
        settled.append(table.filter(pa.compute.invert(mask)))
        others.append((-block.generation, table.filter(mask)))
    others.sort(key=lambda part: part[0])  # stable: of equal ones the block whose id comes first
    return pa.concat_tables([*settled, *(table for _, table in others)])


def runs_of_pairs(pairs: Iterable[Pair]) -> list[Run]:
    """Rows as runs of neighbours, by key in the order of their first row."""
    indices: dict[str, list[int]] = {}
    for key, index in pairs:
        indices.setdefault(key, []).append(index)
    return [run for key, found in indices.items() for run in runs_of(key, sorted(found))]


def count_statuses(rows: Mapping[Pair, Tried]) -> dict[str, int]:
    """How many rows have each status, the commonest first."""
    return dict(Counter(tried.status for tried in rows.values()).most_common())


def _pairs(passing: Iterable[Passing]) -> Iterable[tuple[Pair, int, str]]:
    for each in passing:
        for index in range(each.first, each.first + each.count):
            yield (each.key, index), each.tries, each.status


def _is_wanted(pair: Pair, wanted: Wanted) -> bool:
    return pair[1] in wanted.get(pair[0], ())
