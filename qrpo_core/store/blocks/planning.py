"""Which rows are missing, and how they are packed into blocks: functions of lists of rows alone.

A row is (row key, sample_index). A row key is the prompt_id; for rewards it carries the digest of the ground
truth (`row_key`), so that a changed ground truth asks for new rewards and no new samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, repeat
from sys import intern
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from qrpo_core.common.hashing import ID_LENGTH, digest_bytes
from qrpo_core.store.recipe import Recipe

#: (row key, sample_index)
RowId = tuple[str, int]

#: The sample indices asked for of each row key, increasing; range(n) for the first n.
Wanted = Mapping[str, Sequence[int]]

#: Above every sample_index: row (key number k, index i) is the integer k * STRIDE + i.
STRIDE = 1 << 31


class RowRange(NamedTuple):
    """Rows first .. first + count - 1 of one row key."""

    key: str
    first: int
    count: int  # type: ignore[assignment]  # in place of tuple's method of that name


class RowRanges:
    """Many row ranges as three columns: a store of 16 million rows holds millions of them.

    keys : row keys. first, count : int64, shape (len(keys),).
    """

    __slots__ = ("count", "first", "keys")

    def __init__(self, ranges: Iterable[Sequence[Any]] = ()) -> None:
        keys, first, count = tuple(zip(*ranges, strict=True)) or ((), (), ())
        self.keys: tuple[str, ...] = tuple(map(intern, keys))  # many blocks share a key: keep one copy
        self.first = np.array(first, np.int64)
        self.count = np.array(count, np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[RowRange]:
        return map(RowRange, self.keys, self.first.tolist(), self.count.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowRanges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RowRanges({list(self)!r})"

    def indices(self, key: str) -> set[int]:
        """The sample indices of one row key."""
        if key not in self.keys:
            return set()
        return {
            index for each in self if each.key == key for index in range(each.first, each.first + each.count)
        }


class HasRanges(Protocol):
    """A block, where only its rows matter."""

    @property
    def ranges(self) -> RowRanges: ...


@dataclass(frozen=True)
class BlockPlan:
    """Rows to compute and commit together. Its id follows from its rows: equal plans race for one block.

    seen : manifest keys of the blocks that were known when the plan was made. None of them has a row of the
        plan, except with a retryable status.
    generation : 1, or for retried rows one more than that of any block that has them.
    """

    recipe: Recipe
    ranges: tuple[RowRange, ...]
    seen: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    generation: int = 1

    @cached_property
    def id(self) -> str:
        return block_id(self.recipe.key, self.ranges, self.generation)

    @property
    def manifest_key(self) -> str:
        """Object key of the manifest whose creation makes the block real."""
        return f"{self.recipe.blocks_path}/index/{self.id}.json"

    @property
    def rows(self) -> int:
        return sum(each.count for each in self.ranges)

    def row_ids(self) -> Iterator[RowId]:
        """(row key, sample_index) of every row, in order."""
        for each in self.ranges:
            for index in range(each.first, each.first + each.count):
                yield each.key, index


def block_id(recipe_key: str, ranges: Sequence[Sequence[Any]], generation: int = 1) -> str:
    """The name of the block that holds these rows, 32 hex characters. ranges : (row key, first, count) each.

    It is `digest_json` of the recipe key and the ranges (and the generation, beyond the first), in a tenth of
    the time.
    """
    named = [recipe_key, list(map(list, ranges)), *([generation] if generation > 1 else [])]
    return digest_bytes(orjson.dumps(named))[:ID_LENGTH]


def count_rows(wanted: Wanted) -> int:
    """The number of wanted rows."""
    return sum(map(len, wanted.values()))


def row_key(prompt_id: str, ground_truth_digest: str = "") -> str:
    """The row key of a prompt, with the digest of its ground truth where the row depends on it."""
    return f"{prompt_id}.{ground_truth_digest}" if ground_truth_digest else prompt_id


def ranges_of(wanted: Wanted) -> Iterator[RowRange]:
    """The wanted rows as ranges of neighbours, in the order of `wanted`."""
    for key, indices in wanted.items():
        if isinstance(indices, range) and indices.step == 1:
            if indices:
                yield RowRange(key, indices.start, len(indices))
            continue
        for _, group in groupby(enumerate(indices), lambda place: place[1] - place[0]):
            neighbours = [index for _, index in group]
            yield RowRange(key, neighbours[0], len(neighbours))


def missing_ranges(wanted: Wanted, committed: Iterable[HasRanges]) -> list[RowRange]:
    """The wanted rows that no committed block has, in the order of `wanted`."""
    return subtract(RowRanges(ranges_of(wanted)), committed)


def subtract(asked: RowRanges, committed: Iterable[HasRanges]) -> list[RowRange]:
    """The parts of the ranges that no committed block covers, in their order.

    Every range becomes an interval of the integers key number * STRIDE + index. The rows that no block covers
    are sorted intervals between the blocks', and the answer is where asked and free intervals meet.
    """
    number: dict[str, int] = {}
    for key in asked.keys:
        number.setdefault(key, len(number))
    start = _numbers(asked.keys, number) * STRIDE + asked.first
    end = start + asked.count
    free_start, free_end = _free(number, committed)
    # The free intervals that meet each asked one are those numbered low .. high - 1.
    low = np.searchsorted(free_end, start, side="right")
    pieces = np.searchsorted(free_start, end, side="left") - low
    owner = np.repeat(np.arange(len(asked)), pieces)
    free = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces - low, pieces)
    first = np.maximum(start[owner], free_start[free])
    count = np.minimum(end[owner], free_end[free]) - first
    return [
        RowRange(asked.keys[place], at, rows)
        for place, at, rows in zip(owner.tolist(), (first % STRIDE).tolist(), count.tolist(), strict=True)
    ]


def _free(number: dict[str, int], committed: Iterable[HasRanges]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Starts and ends of the intervals that no committed block covers, increasing and disjoint."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in committed:
        key = _numbers(block.ranges.keys, number)
        known = key >= 0
        start = key[known] * STRIDE + block.ranges.first[known]
        starts.append(start)
        ends.append(start + block.ranges.count[known])
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    start, covered = start[order], np.maximum.accumulate(end[order])
    free_start = np.concatenate([[0], covered])
    free_end = np.concatenate([start, [len(number) * STRIDE]])
    gap = free_start < free_end
    return free_start[gap], free_end[gap]


def _numbers(keys: tuple[str, ...], number: dict[str, int]) -> NDArray[np.int64]:
    return np.fromiter(map(number.get, keys, repeat(-1)), np.int64, len(keys))


def pack(
    recipe: Recipe,
    ranges: Iterable[RowRange],
    rows_per_block: int,
    seen: frozenset[str] = frozenset(),
    generation: int = 1,
) -> Iterator[BlockPlan]:
    """Plans of blocks filled with ranges in order; a range is split where a block is full.

    seen, generation : as in `BlockPlan`.
    """
    block: list[RowRange] = []
    room = rows_per_block
    for each in ranges:
        first, left = each.first, each.count
        while left:
            take = min(left, room)
            block.append(RowRange(each.key, first, take))
            first, left, room = first + take, left - take, room - take
            if not room:
                yield BlockPlan(recipe, tuple(block), seen, generation)
                block, room = [], rows_per_block
    if block:
        yield BlockPlan(recipe, tuple(block), seen, generation)
