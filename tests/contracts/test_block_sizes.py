"""What a kill at any moment loses, how many blocks there are, and what two runs at once compute twice.

Time is a number here: each row takes a fixed time, so that every loss is counted exactly.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_sizes import FEWEST, BlockSizes
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.claims import Claims
from qrpo_core.store.blocks.planning import BlockPlan, Wanted, count_rows
from tests.faults.rows import RECIPE, commit, fill, read

#: Rounding of sums of times.
CLOSE = 1e-6


@dataclass
class Machine:
    """A run of one stage on a store, in its own time.

    load : seconds until the engine is there, in the first block. each : of a block. row : of as many rows as
    are computed at once.
    blocks : when each block began and ended, and its rows.
    """

    store: BlockStore
    wanted: Wanted
    row: float
    load: float = 0.0
    each: float = 0.0
    at_once: int = 1
    now: float = 0.0
    blocks: list[tuple[float, float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = BlockSizes(self.store.config, self.at_once, lambda: self.now)
        self._plans = sizes.blocks(self.store, RECIPE, self.wanted)

    def begin(self) -> tuple[float, BlockPlan] | None:
        """The next block and when it will end; None after the last. Time stands there when it returns."""
        plan = next(self._plans, None)
        if plan is None:
            return None
        began = self.now
        self.now += (
            self.each + self.row * math.ceil(plan.rows / self.at_once) + (0 if self.blocks else self.load)
        )
        self.blocks.append((began, self.now, plan.rows))
        return self.now, plan

    def run(self) -> Machine:
        """Every block, one after the other."""
        while (block := self.begin()) is not None:
            commit(self.store, block[1])
        return self


def stores(path: str, count: int, **changes: float) -> list[BlockStore]:
    """What each of several processes knows of one store."""
    config = StoreConfig(path=path).model_copy(update=changes)
    return [BlockStore(open_objects(config), config) for _ in range(count)]


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@settings(max_examples=25)
@given(
    row=st.floats(0.001, 2),
    load=st.floats(0, 90),
    each=st.floats(0, 0.2),
    count=st.integers(1, 3000),
    minutes=st.sampled_from([0.1, 1.0, 5.0]),
    at_once=st.sampled_from([1, 64]),
)
def test_a_kill_at_any_moment_loses_a_third_of_the_time_at_most(
    row: float, load: float, each: float, count: int, minutes: float, at_once: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (store,) = stores(folder, 1, block_minutes=minutes)
        machine = Machine(store, {"p": range(count)}, row, load, each, at_once).run()
        assert sum(rows for _, _, rows in machine.blocks) == count
        fewest = max(FEWEST, at_once)
        few = each + row * (fewest // at_once)  # cannot be cut further
        part = row if at_once > 1 else 0.0  # rows computed at once that a block does not fill
        for number, (began, ended, rows) in enumerate(machine.blocks):
            lost = ended - began - (0 if number else load)  # at worst: killed just before the commit
            assert lost <= max(ended / 3, few) + part + CLOSE
            assert lost <= max(60 * minutes, few) + part + CLOSE
            assert rows <= max(fewest, 4 * max((each[2] for each in machine.blocks[:number]), default=0))


@pytest.mark.parametrize("row", [0.0001, 0.01, 0.5, 3.0])
def test_a_run_killed_after_30_seconds_has_lost_15_at_most(path: str, row: float) -> None:
    """And the next run begins with few rows again, though the store knows how long a row takes."""
    (store,) = stores(path, 1)
    machine = Machine(store, {"p": range(10_000)}, row)
    while (block := machine.begin()) is not None and machine.now <= 30:
        commit(store, block[1])
    if block is not None:  # killed in this one
        began, _, rows = machine.blocks[-1]
        assert 30 - began <= 15
        assert rows > FEWEST or row > 1
    (again,) = stores(path, 1)
    if again.plan(RECIPE, machine.wanted, 1):
        second = Machine(again, machine.wanted, row)
        second.begin()
        assert second.blocks[0][2] <= FEWEST


@pytest.mark.parametrize(
    ("row", "load", "most"), [(0.0, 0.0, 30), (0.01, 20.0, 30), (0.2, 0.0, 40), (1, 0, 75)]
)
def test_ten_thousand_rows_are_tens_of_blocks(path: str, row: float, load: float, most: int) -> None:
    """With 0.05 s for what each block costs besides; at 1 s a row they are 2 h 47 min of work."""
    (store,) = stores(path, 1)
    machine = Machine(store, {f"{key}": range(100) for key in range(100)}, row, load, 0.05).run()
    assert len(machine.blocks) <= most


def test_rows_that_are_computed_at_once_stay_together(path: str) -> None:
    """The demo's references: 64 at a time take 10 s, and small blocks would take as long."""
    (store,) = stores(path, 1)
    machine = Machine(store, {"p": range(390)}, 10, 10, 0.05, 64).run()
    assert machine.now <= 10 + 10 * 8 + 1  # seven batches without blocks


def test_a_limit_of_rows_is_kept_from_the_first_block(path: str) -> None:
    (store,) = stores(path, 1, rows_per_block=5)
    machine = Machine(store, {"p": range(23)}, 0.01).run()
    assert [rows for _, _, rows in machine.blocks].count(5) == 4
    assert sum(rows for _, _, rows in machine.blocks) == 23


def test_rows_that_slow_down_get_smaller_blocks(path: str) -> None:
    (store,) = stores(path, 1, block_minutes=0.5)
    machine = Machine(store, {"p": range(4000)}, 0.02)
    while machine.now < 40:
        block = machine.begin()
        assert block is not None
        commit(store, block[1])
    machine.row *= 20
    for _ in range(2):
        block = machine.begin()
        assert block is not None
        commit(store, block[1])
    began, ended, _ = machine.blocks[-1]
    assert ended - began <= 30 + CLOSE


@pytest.mark.parametrize(("count", "most"), [(64, 1.25), (400, 1.2), (10_000, 1.15)])
def test_two_runs_at_once_share_the_rows_from_the_first_block_on(path: str, count: int, most: float) -> None:
    """Rows computed by both, over eight pairs of runs that begin in the same instant."""
    random.seed(0)
    computed = 0
    for pair in range(8):
        pair_stores = stores(f"{path}/{pair}", 2)
        wanted = {f"{key}": range(8) for key in range(count // 8)}
        machines = [Machine(store, wanted, 0.1, each=0.01) for store in pair_stores]
        working = {number: block for number, each in enumerate(machines) if (block := each.begin())}
        while working:
            first = min(working, key=lambda number: working[number][0])
            commit(pair_stores[first], working.pop(first)[1])
            if (block := machines[first].begin()) is not None:
                working[first] = block
        assert count_rows(wanted) == read(stores(f"{path}/{pair}", 1)[0], wanted).num_rows
        assert fill(pair_stores[0], wanted) == 0
        computed += sum(rows for each in machines for _, _, rows in each.blocks)
    assert computed <= most * 8 * count


def test_what_a_killed_run_has_claimed_comes_last_and_is_computed(path: str) -> None:
    dead, store = stores(path, 2)
    wanted = {"p": range(60)}
    (plan,) = dead.plan(RECIPE, {"p": range(20, 50)}, 64)
    Claims(dead.objects, RECIPE).claim(plan)
    machine, order = Machine(store, wanted, 0.1), []
    while (block := machine.begin()) is not None:
        order += [index for _, index in block[1].row_ids()]
        commit(store, block[1])
    assert sorted(order[:30]) == [*range(20), *range(50, 60)]
    assert sorted(order) == list(range(60))
    assert len(list(store.objects.keys(f"{RECIPE.blocks_path}/claims/"))) == 1  # its own is gone


@pytest.mark.parametrize("content", [b"{", b"3", b'[["p"]]', b'[["p", 0, "x"]]', b"[[1, 0, 9]]"])
def test_an_unreadable_claim_claims_nothing(path: str, content: bytes) -> None:
    (store,) = stores(path, 1)
    store.objects.write(f"{RECIPE.blocks_path}/claims/other.json", content)
    assert sum(rows for _, _, rows in Machine(store, {"p": range(20)}, 0.1).run().blocks) == 20


class LaggingObjects:
    """A back end whose listings are those of its first moment."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._listed: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def keys(self, prefix: str, *args: Any, **kwargs: Any) -> list[str]:
        """What the first listing of this prefix showed."""
        return self._listed.setdefault(prefix, list(self._objects.keys(prefix, *args, **kwargs)))


def test_a_run_computes_no_row_twice_where_listings_lag(path: str) -> None:
    config = StoreConfig(path=path)
    store = BlockStore(LaggingObjects(open_objects(config)), config)
    wanted = {f"{number:032x}": range(4) for number in range(100)}
    machine = Machine(store, wanted, row=0.5).run()
    assert sum(rows for *_, rows in machine.blocks) == count_rows(wanted)
    assert len(machine.blocks) > 5
