"""Which rows are missing, and how they are packed into blocks: functions of lists of rows alone.

A row is (row key, sample_index). A row key is the prompt_id; for rewards it carries the digest of what the
prompt is checked against (`row_key`), so that a changed reference asks for new rewards and no new samples.
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

from qrpo_core.ids import ID_LENGTH, digest_bytes
from qrpo_core.store.recipe import Recipe

#: The sample indices asked for of each row key, increasing; range(n) for the first n.
Wanted = Mapping[str, Sequence[int]]

#: Above every sample_index: row (key number k, index i) is the integer k * STRIDE + i.
STRIDE = 1 << 31


class Run(NamedTuple):
    """Rows first .. first + count - 1 of one row key."""

    key: str
    first: int
    count: int  # type: ignore[assignment]  # in place of tuple's method of that name


class Runs:
    """Many runs as three columns: a store of 16 million rows holds millions of them.

    keys : row keys. first, count : int64, shape (len(keys),).
    """

    __slots__ = ("count", "first", "keys")

    def __init__(self, runs: Iterable[Sequence[Any]] = ()) -> None:
        keys, first, count = tuple(zip(*runs, strict=True)) or ((), (), ())
        self.keys: tuple[str, ...] = tuple(map(intern, keys))  # a key stands in many blocks, once in memory
        self.first = np.array(first, np.int64)
        self.count = np.array(count, np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, span: slice) -> list[Run]:
        columns = self.keys[span], self.first[span].tolist(), self.count[span].tolist()
        return list(map(Run, *columns))

    def __iter__(self) -> Iterator[Run]:
        return map(Run, self.keys, self.first.tolist(), self.count.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Runs({list(self)!r})"


class HasRuns(Protocol):
    """A block, where only its rows matter."""

    @property
    def runs(self) -> Runs: ...


@dataclass(frozen=True)
class BlockPlan:
    """Rows to compute and commit together. Its id follows from its rows: equal plans race for one block.

    seen : index entries of the blocks that were known when it was made: none has one of its rows, except with
        a status that can pass.
    generation : 1, or for rows that are tried again one more than that of any block that has them.
    """

    recipe: Recipe
    runs: tuple[Run, ...]
    seen: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    generation: int = 1

    @cached_property
    def id(self) -> str:
        return block_id(self.recipe.key, self.runs, self.generation)

    @property
    def index(self) -> str:
        """Object key of the manifest whose creation makes the block real."""
        return f"{self.recipe.blocks_path}/index/{self.id}.json"

    @property
    def rows(self) -> int:
        return sum(run.count for run in self.runs)

    def pairs(self) -> Iterator[tuple[str, int]]:
        """(row key, sample_index) of every row, in order."""
        for run in self.runs:
            for index in range(run.first, run.first + run.count):
                yield run.key, index


def block_id(recipe_key: str, runs: Sequence[Sequence[Any]], generation: int = 1) -> str:
    """The name of the block that holds these rows, 32 hex characters. runs : (row key, first, count) each.

    It is `digest_json` of the recipe key and the runs (and the generation, beyond the first), in a tenth of
    the time.
    """
    named = [recipe_key, list(map(list, runs)), *([generation] if generation > 1 else [])]
    return digest_bytes(orjson.dumps(named))[:ID_LENGTH]


def count_rows(wanted: Wanted) -> int:
    """How many rows are asked for."""
    return sum(map(len, wanted.values()))


def row_key(prompt_id: str, reference_digest: str = "") -> str:
    """The row key of a prompt, with the digest of its reference where the row depends on it."""
    return f"{prompt_id}.{reference_digest}" if reference_digest else prompt_id


def missing_runs(wanted: Wanted, committed: Iterable[HasRuns]) -> list[Run]:
    """What is asked for and not committed, in the order of `wanted`."""
    asked = (run for key, indices in wanted.items() for run in runs_of(key, indices))
    return subtract(Runs(asked), committed)


def runs_of(key: str, indices: Sequence[int]) -> Iterator[Run]:
    """Increasing indices as runs of neighbours."""
    if isinstance(indices, range) and indices.step == 1:
        if indices:
            yield Run(key, indices.start, len(indices))
        return
    for _, group in groupby(enumerate(indices), lambda place: place[1] - place[0]):
        neighbours = [index for _, index in group]
        yield Run(key, neighbours[0], len(neighbours))


def subtract(asked: Runs, committed: Iterable[HasRuns]) -> list[Run]:
    """The parts of the runs asked for that no committed block covers, in their order.

    Every run becomes an interval of the integers key number * STRIDE + index; what no block covers are sorted
    intervals between them, and the answer is where the two meet.
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
        Run(asked.keys[run], at, rows)
        for run, at, rows in zip(owner.tolist(), (first % STRIDE).tolist(), count.tolist(), strict=True)
    ]


def _free(number: dict[str, int], committed: Iterable[HasRuns]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Starts and ends of the intervals that no committed block covers, increasing and disjoint."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in committed:
        key = _numbers(block.runs.keys, number)
        known = key >= 0
        start = key[known] * STRIDE + block.runs.first[known]
        starts.append(start)
        ends.append(start + block.runs.count[known])
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
    runs: Iterable[Run],
    rows_per_block: int,
    seen: frozenset[str] = frozenset(),
    generation: int = 1,
) -> Iterator[BlockPlan]:
    """Fill blocks with runs in order, splitting a run where a block is full.

    seen, generation : as in `BlockPlan`.
    """
    block: list[Run] = []
    room = rows_per_block
    for run in runs:
        first, left = run.first, run.count
        while left:
            take = min(left, room)
            block.append(Run(run.key, first, take))
            first, left, room = first + take, left - take, room - take
            if not room:
                yield BlockPlan(recipe, tuple(block), seen, generation)
                block, room = [], rows_per_block
    if block:
        yield BlockPlan(recipe, tuple(block), seen, generation)
