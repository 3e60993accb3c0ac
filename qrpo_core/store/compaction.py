"""Merging small blocks into large ones, safe to stop anywhere and to run beside everything else.

The merged block is committed first, then the index entries of the blocks in it go, then their data: at every
moment each row is in the index, for a while twice. What a reader gets for a row never changes. That matters
where two blocks hold one row drawn twice with different results (an engine that is not exact, two runs at
once): the block whose id comes first has it. So blocks that share rows are always merged together, with the
rows that readers get, and their entries are taken away from the last id to the first. (Where one of them
holds just the rows of the merged block, and not as readers get them, its name is taken: such a group stays.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from qrpo_core.errors import DamagedError, MissingError
from qrpo_core.store.block_data import BlockData
from qrpo_core.store.block_manifest import BlockManifest
from qrpo_core.store.passing import Pair, passing_rows, settled_first
from qrpo_core.store.planning import STRIDE, BlockPlan, Wanted, pack, runs_of
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.tables import select, select_pairs

Group = list[BlockManifest]


class Store(Protocol):
    """Stores a block's rows and makes them real. tries : of those whose status can pass."""

    def __call__(
        self,
        plan: BlockPlan,
        table: pa.Table,
        seconds: float,
        facts: dict[str, Any],
        tries: Mapping[Pair, int] | None = None,
    ) -> BlockManifest: ...


@dataclass(frozen=True)
class Compaction:
    """What a compaction did. before, after : blocks of the recipe. rows : rows that were written anew."""

    before: int
    after: int
    rows: int


def compact(data: BlockData, store: Store, recipe: Recipe, rows_per_block: int) -> Compaction:
    """Merge blocks of less than half of `rows_per_block`, and blocks that share rows."""
    blocks = data.index.committed(recipe)
    rows = 0
    for group in _groups(blocks, rows_per_block):
        rows += _merge(data, store, recipe, group, rows_per_block)
    return Compaction(len(blocks), len(data.index.committed(recipe)), rows)


def _groups(blocks: Sequence[BlockManifest], rows_per_block: int) -> Iterator[Group]:
    """Blocks to merge, two or more together."""
    sharing = _sharing(blocks)
    yield from (group for group in sharing if len(group) > 1)
    small = [group[0] for group in sharing if len(group) == 1 and group[0].rows * 2 < rows_per_block]
    group: Group = []
    room = rows_per_block
    # By age, so that prompts that were next to each other stay so; a wrong clock costs that at most.
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
        for key in block.runs.keys:
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
    """Pairs of blocks (by position) that share a row: enough of them to connect all that do."""
    if not number:
        return set()
    keys = [np.array([number[key] for key in block.runs.keys], np.int64) for block in blocks]
    start = np.concatenate([key * STRIDE + b.runs.first for key, b in zip(keys, blocks, strict=True)])
    end = start + np.concatenate([block.runs.count for block in blocks])
    owner = np.repeat(np.arange(len(blocks)), [len(block.runs) for block in blocks])
    order = np.argsort(start, kind="stable")
    start, end, owner = start[order], end[order], owner[order]
    furthest = np.maximum.accumulate(end)
    # Where each run's furthest predecessor stands: the last one that moved the furthest end.
    moved = np.where(np.diff(furthest, prepend=-1) > 0, np.arange(len(end)), 0)
    reach = np.maximum.accumulate(moved)
    shared = np.flatnonzero(start[1:] < furthest[:-1]) + 1
    return set(zip(owner[shared].tolist(), owner[reach[shared - 1]].tolist(), strict=True))


def _merge(data: BlockData, store: Store, recipe: Recipe, group: Group, rows_per_block: int) -> int:
    """Replace a group by as few blocks as it takes; returns the rows written, 0 if it has to stay."""
    wanted = _rows_of(group)
    table = select(_read(data, group), wanted)  # the group is by block id: the first of doubles is the one
    runs = (run for key, indices in wanted.items() for run in runs_of(key, indices))
    parts: list[tuple[BlockPlan, pa.Table]] = []
    first = 0
    passing = passing_rows(group)
    generation = max(block.generation for block in group)
    if generation > 1 or passing:
        generation += 1  # a name that no block of the group has, and none that was planned before it had rows
    for plan in pack(recipe, runs, rows_per_block, generation=generation):
        parts.append((plan, table.slice(first, plan.rows)))
        first += plan.rows
    if any(_is_taken(data, group, plan, part) for plan, part in parts):
        return 0
    facts, seconds = merged_facts(group), sum(block.seconds for block in group) / len(table)
    tries = {pair: tried.tries for pair, tried in passing.items()}
    made = [
        store(plan, part, seconds * plan.rows, _share(facts, plan.rows / len(table)), tries)
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
    """Whether a block of exactly these rows is there that holds them otherwise: its name cannot be had."""
    for block in group:
        if block.block == plan.id:
            theirs, _ = select_pairs(data.fetch(block, check=True), list(plan.pairs()))
            return not theirs.cast(part.schema).equals(part)
    return False


def _read(data: BlockData, group: Group) -> pa.Table:
    """All rows of a group, those first that a reader takes, checked against their digests."""
    tables: list[pa.Table] = []
    for block in group:
        try:
            tables.append(data.fetch(block, check=True))
        except (MissingError, DamagedError) as error:
            raise data.set_aside([(block, error.message)]) from None
    return settled_first([table.cast(tables[0].schema) for table in tables], group)


def _rows_of(group: Group) -> Wanted:
    """The rows that a group holds, by key."""
    rows: dict[str, set[int]] = {}
    for block in group:
        for run in block.runs:
            rows.setdefault(run.key, set()).update(range(run.first, run.first + run.count))
    return {key: sorted(indices) for key, indices in rows.items()}


def _share(facts: dict[str, Any], share: float) -> dict[str, Any]:
    """The facts of a part of merged blocks: counts in proportion to its rows."""
    return {
        name: round(value * share) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in facts.items()
    }


def merged_facts(group: Group) -> dict[str, Any]:
    """The facts of blocks as those of one.

    exact : only if all were. engine : the one, or engines : all of them. Counts (tokens) are added up. Any
    other fact is kept where all blocks agree, else as the list of what they say.
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
