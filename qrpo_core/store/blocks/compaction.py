"""Merging small blocks into large ones. It is safe to stop at any point and beside readers and writers.

First the merged block is committed, then the manifests of its sources are deleted, then their data: at every
moment the index has each row, for a while twice. The row that a reader gets never changes. That matters where
two blocks hold different results for one row (an engine that is not exact, two runs at once): the block whose
id comes first is valid. So blocks that share rows are always merged together, with the valid rows, and their
manifests are deleted from the last id to the first. (If one of them has just the rows of the merged block,
and not all of them valid, the merged block's name is taken: such a group stays.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.planning import STRIDE, BlockPlan, RowId, Wanted, pack, ranges_of
from qrpo_core.store.blocks.reading import BlockData
from qrpo_core.store.blocks.retryable import retryable_rows, settled_first
from qrpo_core.store.blocks.tables import select, select_rows
from qrpo_core.store.recipe import Recipe

Group = list[BlockManifest]


#: `BlockStore._store`: stores a block's rows and makes them real; returns the manifest.
Store = Callable[[BlockPlan, pa.Table, float, dict[str, Any], Mapping[RowId, int]], BlockManifest]


@dataclass(frozen=True)
class Compaction:
    """The outcome of a compaction. before, after : blocks of the recipe. rows : rewritten rows."""

    before: int
    after: int
    rows: int


def compact(data: BlockData, store: Store, recipe: Recipe, rows_per_block: int) -> Compaction:
    """Merge blocks of less than half of `rows_per_block`, and blocks that share rows."""
    blocks = list(data.index.stream(recipe))
    rows = 0
    for group in _groups(blocks, rows_per_block):
        rows += _merge(data, store, recipe, group, rows_per_block)
    return Compaction(len(blocks), sum(1 for _ in data.index.stream(recipe)), rows)


def _groups(blocks: Sequence[BlockManifest], rows_per_block: int) -> Iterator[Group]:
    """Groups of two or more blocks to merge."""
    sharing = _sharing(blocks)
    yield from (group for group in sharing if len(group) > 1)
    small = [group[0] for group in sharing if len(group) == 1 and group[0].rows * 2 < rows_per_block]
    group: Group = []
    room = rows_per_block
    # By age, so that neighbouring prompts stay neighbours; a wrong clock costs no more than that.
    for block in sorted(small, key=lambda block: (block.created, block.block)):
        if block.rows > room:
            if len(group) > 1:
                yield group
            group, room = [], rows_per_block
        group.append(block)
        room -= block.rows
    if len(group) > 1:
        yield group


def _sharing(blocks: Sequence[BlockManifest]) -> list[Group]:
    """The blocks in groups such that blocks of different groups have no row in common."""
    number: dict[str, int] = {}
    for block in blocks:
        for key in block.ranges.keys:
            number.setdefault(key, len(number))
    leader = list(range(len(blocks)))

    def lead(block: int) -> int:
        while leader[block] != block:
            leader[block] = leader[leader[block]]
            block = leader[block]
        return block

    for one, other in _overlaps(blocks, number):
        leader[lead(one)] = lead(other)
    groups: dict[int, Group] = {}
    for position, block in enumerate(blocks):
        groups.setdefault(lead(position), []).append(block)
    return list(groups.values())


def _overlaps(blocks: Sequence[BlockManifest], number: dict[str, int]) -> set[tuple[int, int]]:
    """Pairs of blocks (by position) that share a row; enough pairs to connect all such blocks."""
    if not number:
        return set()
    keys = [np.array([number[key] for key in block.ranges.keys], np.int64) for block in blocks]
    start = np.concatenate([key * STRIDE + b.ranges.first for key, b in zip(keys, blocks, strict=True)])
    end = start + np.concatenate([block.ranges.count for block in blocks])
    owner = np.repeat(np.arange(len(blocks)), [len(block.ranges) for block in blocks])
    order = np.argsort(start, kind="stable")
    start, end, owner = start[order], end[order], owner[order]
    furthest = np.maximum.accumulate(end)
    # The position of each range's furthest predecessor: the last one that moved the furthest end.
    moved = np.where(np.diff(furthest, prepend=-1) > 0, np.arange(len(end)), 0)
    reach = np.maximum.accumulate(moved)
    shared = np.flatnonzero(start[1:] < furthest[:-1]) + 1
    return set(zip(owner[shared].tolist(), owner[reach[shared - 1]].tolist(), strict=True))


def _merge(data: BlockData, store: Store, recipe: Recipe, group: Group, rows_per_block: int) -> int:
    """Replace a group by as few blocks as possible; returns the rows written, 0 if the group stays."""
    wanted = _rows_of(group)
    table = select(_read(data, group), wanted)  # the group is by block id: the first of duplicates is valid
    parts: list[tuple[BlockPlan, pa.Table]] = []
    first = 0
    retryable = retryable_rows(group)
    generation = max(block.generation for block in group)
    if generation > 1 or retryable:
        generation += 1  # a name that neither a block of the group nor an earlier plan has
    for plan in pack(recipe, ranges_of(wanted), rows_per_block, generation=generation):
        parts.append((plan, table.slice(first, plan.rows)))
        first += plan.rows
    if any(_is_taken(data, group, plan, part) for plan, part in parts):
        return 0
    facts, seconds = merged_facts(group), sum(block.seconds for block in group) / len(table)
    tries = {pair: tried.tries for pair, tried in retryable.items()}
    made = [
        store(plan, part, seconds * plan.rows, _part(facts, plan.rows / len(table)), tries)
        for plan, part in parts
    ]
    kept = {block.block for block in made}
    for block in sorted(group, key=lambda block: block.block, reverse=True):
        if block.block not in kept:
            data.index.remove(block)
    for file in {block.file for block in group} - {block.file for block in made}:
        data.index.objects.delete(file)
    return len(table)


def _is_taken(data: BlockData, group: Group, plan: BlockPlan, part: pa.Table) -> bool:
    """Whether the plan's name belongs to a block of the group with other results for the same rows."""
    for block in group:
        if block.block == plan.id:
            theirs, _ = select_rows(data.fetch(block, check=True), list(plan.row_ids()))
            return not theirs.cast(part.schema).equals(part)
    return False


def _read(data: BlockData, group: Group) -> pa.Table:
    """All rows of a group, verified; of duplicates the first is the valid one."""
    tables: list[pa.Table] = []
    for block in group:
        try:
            tables.append(data.fetch(block, check=True))
        except (MissingError, DamagedError) as error:
            raise data.quarantine([(block, error.message)]) from None
    return settled_first([table.cast(tables[0].schema) for table in tables], group)


def _rows_of(group: Group) -> Wanted:
    """The rows of a group, by key."""
    rows: dict[str, set[int]] = {}
    for block in group:
        for each in block.ranges:
            rows.setdefault(each.key, set()).update(range(each.first, each.first + each.count))
    return {key: sorted(indices) for key, indices in rows.items()}


def _part(facts: dict[str, Any], fraction: float) -> dict[str, Any]:
    """The facts of a part of merged blocks: counts in proportion to its rows."""
    return {
        name: round(value * fraction) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in facts.items()
    }


def merged_facts(group: Group) -> dict[str, Any]:
    """The facts of a merged block.

    exact : only if all blocks are. engine : the only one, or engines : all of them. Counts (tokens) are
    summed. Any other fact is kept if all blocks agree, else as the list of its values.
    """
    names = sorted({name for block in group for name in block.facts} - {"exact", "engine", "engines"})
    facts: dict[str, Any] = {}
    for name in names:
        values = [block.facts.get(name) for block in group]
        if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            facts[name] = sum(values)
        else:
            different = [value for place, value in enumerate(values) if value not in values[:place]]
            facts[name] = different[0] if len(different) == 1 else different
    if any("exact" in block.facts for block in group):
        facts["exact"] = all(block.exact for block in group)
    engines = {name for block in group for name in block.facts.get("engines", ())}
    engines |= {block.facts["engine"] for block in group if "engine" in block.facts}
    if engines:
        facts |= {"engine": engines.pop()} if len(engines) == 1 else {"engines": sorted(engines)}
    return facts
