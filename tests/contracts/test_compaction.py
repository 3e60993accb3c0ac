"""Merging blocks: nothing a reader can see changes, wherever it stops and whoever works beside it."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import pytest

from qrpo_core.common.errors import DamagedError
from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.local import LocalObjects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.compaction import Compaction, _part, merged_facts
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.planning import BlockPlan, RowRange, RowRanges, missing_ranges, pack
from tests.faults.rows import RECIPE, Dying, Killed, commit, fill, read, rows

WANTED = {"p": range(6), "q": range(3), "r": (1, 5)}


def overlapping(objects: Objects, seed: int) -> dict[str, tuple[int, ...]]:
    """Blocks of random rows that share some, drawn anew each: which one counts must never change."""
    chance = random.Random(seed)
    wanted: dict[str, set[int]] = {}
    for value in range(6):
        asked = {key: tuple(sorted(chance.sample(range(5), 2))) for key in chance.sample("pqrs", 2)}
        # As by runs that saw nothing of each other; exact, so that no row is left out.
        (plan,) = pack(RECIPE, missing_ranges(asked, []), 8)
        commit(BlockStore(objects), plan, float(value), exact=True)
        for key, indices in asked.items():
            wanted.setdefault(key, set()).update(indices)
    return {key: tuple(sorted(indices)) for key, indices in wanted.items()}


def test_small_blocks_become_large_ones(objects: Objects) -> None:
    blocks = BlockStore(objects)
    fill(blocks, WANTED, rows_per_block=2)
    before = read(blocks, WANTED)
    old = blocks.committed(RECIPE)
    assert blocks.compact(RECIPE, 8) == Compaction(before=6, after=2, rows=11)
    for fresh in (blocks, BlockStore(objects)):
        assert fresh.plan(RECIPE, WANTED, 2) == []
        assert read(fresh, WANTED).equals(before)
        assert sorted(block.rows for block in fresh.committed(RECIPE)) == [3, 8]
    assert [check.damage for check in blocks.verify(RECIPE)] == ["", ""]
    keys = set(objects.keys(""))
    assert not keys & {block.manifest_key for block in old}
    assert not keys & {block.file for block in old}
    assert len(keys) == 2 + 2 + 2  # recipe and announcements, data, manifests
    assert sum(block.seconds for block in blocks.committed(RECIPE)) == pytest.approx(0.6, abs=2e-3)


def test_large_blocks_are_left_alone_and_a_second_time_nothing_is_done(objects: Objects) -> None:
    blocks = BlockStore(objects)
    fill(blocks, {"p": range(4)}, rows_per_block=4)
    fill(blocks, {"p": range(9)}, rows_per_block=1)
    large = max(blocks.committed(RECIPE), key=lambda block: block.rows)
    assert blocks.compact(RECIPE, 8) == Compaction(before=6, after=2, rows=5)
    assert large in blocks.committed(RECIPE)
    assert blocks.compact(RECIPE, 8) == Compaction(before=2, after=2, rows=0)
    assert BlockStore(objects).compact(RECIPE, 8).rows == 0
    assert BlockStore(objects).compact(RECIPE.from_dict({**RECIPE.to_dict(), "version": 9}), 8).before == 0


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_are_twice_there_stay_what_they_are(local_store: StoreConfig, seed: int) -> None:
    objects = open_objects(local_store)
    wanted = overlapping(objects, seed)
    before = read(BlockStore(objects), wanted)
    there = len(BlockStore(objects).committed(RECIPE))
    for most in (4, 4, 16, 64):
        done = BlockStore(objects).compact(RECIPE, most)
        assert read(BlockStore(objects), wanted).equals(before)
    stays = done.after > 1  # a name was taken
    assert done.after < there
    assert (sum(block.rows for block in BlockStore(objects).committed(RECIPE)) == before.num_rows) or stays


def test_a_group_whose_name_is_taken_stays(objects: Objects) -> None:
    """One block of p:0 and another of p:0 and p:1 that loses p:0: merged, they have its name."""
    key = next(key for key in "abcdefgh" if _plan(key, 1).id < _plan(key, 2).id)
    one, two = _plan(key, 1), _plan(key, 2)
    commit(BlockStore(objects), one, 1.0, exact=True)
    commit(BlockStore(objects), two, 2.0, exact=True)
    assert BlockStore(objects).compact(RECIPE, 8) == Compaction(before=2, after=2, rows=0)
    assert read(BlockStore(objects), {key: range(2)})["logprob"].to_pylist() == [1.0, 1.0]
    # With more in the group it gets another name.
    fill(BlockStore(objects), {"z": range(1)}, exact=True)
    commit(BlockStore(objects), _plan(key, 3, 1), 3.0, exact=True)
    before = read(BlockStore(objects), {key: range(3)})
    assert BlockStore(objects).compact(RECIPE, 8).after == 2
    assert read(BlockStore(objects), {key: range(3)}).equals(before)


def _plan(key: str, end: int, first: int = 0) -> BlockPlan:
    """Rows first .. end - 1 of a key, as planned by one who saw nothing of what is there."""
    return BlockPlan(RECIPE, (RowRange(key, first, end - first),))


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_nothing_changes_and_it_can_be_finished(local_store: StoreConfig, seed: int) -> None:
    for changes in count():
        objects = LocalObjects(open_objects(local_store).root / f"{changes}")  # type: ignore[attr-defined]
        wanted = overlapping(objects, seed)
        wanted |= {"t": range(5)}
        fill(BlockStore(objects), wanted, rows_per_block=1)
        before = read(BlockStore(objects), wanted)
        finished = True
        try:
            BlockStore(Dying(objects, changes)).compact(RECIPE, 16)  # type: ignore[arg-type]
        except Killed:
            finished = False
        assert BlockStore(objects).plan(RECIPE, wanted, 8) == []
        assert read(BlockStore(objects), wanted).equals(before)
        BlockStore(objects).compact(RECIPE, 16)
        assert read(BlockStore(objects), wanted).equals(before)
        assert [check.damage for check in BlockStore(objects).verify(RECIPE)].count("") == len(
            BlockStore(objects).committed(RECIPE)
        )
        if finished:
            break
    assert changes > 8


def test_a_reader_of_the_old_listing_finds_the_merged_block(objects: Objects) -> None:
    fill(BlockStore(objects), WANTED, rows_per_block=2)
    before = read(BlockStore(objects), WANTED)
    reader = BlockStore(objects)

    class Slow:
        """Hands over a listing, and lets a compaction run before any data is read."""

        listed = False

        def __getattr__(self, name: str) -> Any:
            return getattr(objects, name)

        def read(self, key: str) -> bytes:
            if "/rows/" in key and not self.listed:
                self.listed = True
                assert BlockStore(objects).compact(RECIPE, 16).after == 1
            return objects.read(key)

    reader = BlockStore(Slow())  # type: ignore[arg-type]
    assert read(reader, WANTED).equals(before)
    assert list(reader.quarantined()) == []
    assert len(reader.committed(RECIPE)) == 1


def test_a_block_in_the_making_is_committed_beside_it(objects: Objects) -> None:
    worker = BlockStore(objects)
    fill(worker, {"p": range(6)}, rows_per_block=2)
    plans = worker.plan(RECIPE, {"p": range(10)}, 2)
    BlockStore(objects).compact(RECIPE, 16)
    for plan in plans:
        assert worker.still_missing(plan) is plan
        commit(worker, plan)
    assert [block.rows for block in worker.committed(RECIPE)].count(6) == 1
    assert read(worker, {"p": range(10)})["logprob"].to_pylist() == [-float(i) for i in range(10)]


def test_a_damaged_block_is_quarantined_not_merged(objects: Objects) -> None:
    blocks = BlockStore(objects)
    fill(blocks, {"p": range(6)}, rows_per_block=2)
    hurt = blocks.committed(RECIPE)[1]
    data = objects.read(hurt.file)
    objects.write(hurt.file, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(DamagedError, match="2 rows are quarantined"):
        # Also where readers compare nothing: a merged block has a digest of its own.
        BlockStore(objects, StoreConfig(verify="never")).compact(RECIPE, 16)
    assert fill(blocks, {"p": range(6)}, rows_per_block=2) == 2
    assert blocks.compact(RECIPE, 16).after == 1


def test_counts_are_shared_out_among_the_parts_of_what_is_merged() -> None:
    facts = {"tokens": 10, "cut": 6, "exact": True, "engine": "a"}
    assert _part(facts, 0.5) == {"tokens": 5, "cut": 3, "exact": True, "engine": "a"}
    assert _part(facts, 1.0) == facts


def test_facts_are_merged() -> None:
    def facts(*each: dict[str, Any]) -> dict[str, Any]:
        return merged_facts(
            [BlockManifest("b", RowRanges(), 0, "f", "d", 0, 0.0, "", "", one) for one in each]
        )

    assert facts({}, {}) == {}
    assert facts({"exact": True, "engine": "a"}, {"exact": True, "engine": "a"}) == {
        "exact": True,
        "engine": "a",
    }
    assert facts({"exact": True}, {"exact": False}) == {"exact": False}
    assert facts({"exact": True}, {}) == {"exact": False}
    assert facts({"engine": "b"}, {"engines": ["a", "c"]}) == {"engines": ["a", "b", "c"]}
    assert facts({"tokens": 3, "run": "x", "device": "cpu"}, {"tokens": 4, "run": "y", "device": "cpu"}) == {
        "tokens": 7,
        "run": ["x", "y"],
        "device": "cpu",
    }


def test_merged_rows_are_those_of_the_runs(objects: Objects) -> None:
    blocks = BlockStore(objects)
    for value, pairs in ((1.0, [("q", 1), ("p", 0)]), (1.0, [("p", 1), ("q", 0)])):
        for plan in blocks.plan(RECIPE, {key: (index,) for key, index in pairs}, 8):
            blocks.commit(plan, rows(list(plan.row_ids()), value), LOGPROBS, 1.0)
    blocks.compact(RECIPE, 8)
    (merged,) = blocks.committed(RECIPE)
    assert sorted(merged.ranges) == [RowRange("p", 0, 2), RowRange("q", 0, 2)]
