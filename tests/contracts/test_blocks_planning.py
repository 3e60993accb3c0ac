"""What is planned, in blocks of which size, and read: on both back ends, and as laws of runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import MissingError
from qrpo_core.common.hashing import digest_json
from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks import manifest
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.planning import RowRange, RowRanges, block_id, missing_ranges
from qrpo_core.store.recipe import Recipe
from tests.faults.rows import RECIPE, commit, fill, read, rows

FIVE = {"p": range(3), "q": range(2)}


class TestPlanning:
    def test_a_larger_budget_computes_the_new_rows_only(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 6
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 0
        first = read(blocks, {"p": range(3), "q": range(3)})
        assert fill(blocks, {"p": range(6), "new": range(2), "q": range(3)}) == 5
        assert read(blocks, {"p": range(3), "q": range(3)}).equals(first)
        table = read(blocks, {"q": range(1), "p": range(6)})
        assert table["prompt_id"].to_pylist() == ["q"] + ["p"] * 6
        assert table["sample_index"].to_pylist() == [0, *range(6)]

    def test_scattered_rows_are_asked_for_and_read_alone(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        assert fill(blocks, {"p": (2, 3, 7), "q": range(1)}) == 4
        assert fill(blocks, {"p": (1, 3, 7)}) == 1
        assert fill(blocks, {"p": range(9)}) == 5
        table = read(blocks, {"q": (0,), "p": (3, 7)})
        assert table["prompt_id"].to_pylist() == ["q", "p", "p"]
        assert table["sample_index"].to_pylist() == [0, 3, 7]

    def test_a_fresh_reader_sees_the_same(self, objects: Objects) -> None:
        fill(BlockStore(objects), {"p": range(5)})
        assert BlockStore(objects).plan(RECIPE, {"p": range(5)}, 4) == []

    def test_rows_that_are_not_there_are_counted(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        fill(blocks, {"p": range(2)})
        with pytest.raises(MissingError, match="3 of 5 rows"):
            read(blocks, {"p": range(5)})
        with pytest.raises(MissingError, match="row p:7"):
            blocks.read_rows(RECIPE, [("p", 1), ("p", 7)], LOGPROBS)
        with pytest.raises(MissingError, match="row q:0"):
            blocks.read_rows(RECIPE, [("q", 0)], LOGPROBS)

    def test_rows_are_read_in_the_order_of_pairs(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        fill(blocks, {"p": range(5), "q": range(5)})
        pairs = [("q", 3), ("p", 4), ("q", 0), ("p", 4)]
        table = blocks.read_rows(RECIPE, pairs, LOGPROBS)
        found = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        assert list(found) == pairs
        assert blocks.read_rows(RECIPE, [], LOGPROBS).num_rows == 0

    def test_recipes_are_listed(self, objects: Objects) -> None:
        other = Recipe("reward", 2, {"a": [1]}, {"completions": RECIPE.key})
        fill(BlockStore(objects), {"p": range(1)})
        commit(BlockStore(objects), BlockStore(objects).plan(other, {"p": range(1)}, 1)[0])
        assert BlockStore(objects).recipes("logprob") == [RECIPE.to_dict()]
        assert BlockStore(objects).all_recipes() == [RECIPE, other]

    def test_still_missing_is_what_nobody_committed_since(self, objects: Objects) -> None:
        mine, theirs = BlockStore(objects), BlockStore(objects)
        small, large = mine.plan(RECIPE, {"p": (1, 2, 5)}, 8)[0], mine.plan(RECIPE, FIVE, 8)[0]
        assert mine.still_missing(large) is large
        commit(theirs, small)
        left = mine.still_missing(large)
        assert left is not None
        assert left.ranges == (RowRange("p", 0, 1), RowRange("q", 0, 2))
        assert mine.still_missing(small) is None
        commit(theirs, left)
        assert mine.still_missing(large) is None

    def test_what_was_known_when_a_plan_was_made_is_looked_through_no_more(self, objects: Objects) -> None:
        mine, theirs = BlockStore(objects), BlockStore(objects)
        fill(theirs, {"p": range(3)})
        plan = mine.plan(RECIPE, FIVE, 8)[0]
        assert plan.seen == {block.manifest_key for block in theirs.committed(RECIPE)}
        assert plan.ranges == (RowRange("q", 0, 2),)
        new = commit(theirs, theirs.plan(RECIPE, {"q": range(1)}, 8)[0])
        left = mine.still_missing(plan)
        assert left is not None
        assert left.ranges == (RowRange("q", 1, 1),)
        assert left.seen == plan.seen
        assert new.manifest_key not in plan.seen

    def test_a_clock_that_jumps_back_decides_nothing(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Early(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) - timedelta(days=366)

        blocks = BlockStore(objects)
        (first,) = blocks.plan(RECIPE, {"p": range(4)}, 4)
        winner = commit(blocks, first, 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "datetime", Early)
            assert commit(BlockStore(objects), first, 9.0) == winner  # the earlier time wins no race
            (second,) = blocks.plan(RECIPE, {"p": range(8)}, 4)
            assert second.ranges == (RowRange("p", 4, 4),)
            assert commit(blocks, second).created < (datetime.now(UTC) - timedelta(days=365)).isoformat()
        for fresh in (blocks, BlockStore(objects)):
            assert fresh.plan(RECIPE, {"p": range(8)}, 4) == []
            assert read(fresh, {"p": range(8)})["sample_index"].to_pylist() == list(range(8))
        assert blocks.compact(RECIPE, 32).after == 1
        assert read(BlockStore(objects), {"p": range(8)})["logprob"].to_pylist() == [
            -float(i) for i in range(8)
        ]


class TestRates:
    def test_another_recipes_rate_tells_the_time(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        assert blocks.rate(RECIPE) is None
        plan = blocks.plan(RECIPE, {"p": range(10)}, 10)[0]
        blocks.commit(plan, rows(list(plan.row_ids())), LOGPROBS, seconds=0.01)
        for fresh in (blocks, BlockStore(objects)):
            assert fresh.rate(RECIPE) == fresh.rate(Recipe("logprob", 2)) == pytest.approx(1000)
            assert fresh.rate(Recipe("sample", 1)) is None

    def test_only_the_newest_blocks_count_and_few_are_read(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blocks = BlockStore(objects)
        for number, plan in enumerate(blocks.plan(RECIPE, {"p": range(40)}, 1)):
            blocks.commit(plan, rows(list(plan.row_ids())), LOGPROBS, seconds=number + 1, exact=True)
        fresh, read_keys = BlockStore(objects), []
        real = objects.read
        monkeypatch.setattr(objects, "read", lambda key: read_keys.append(key) or real(key))
        assert fresh.rate(Recipe("logprob", 2)) is not None
        assert len(read_keys) == 20


def test_pack_splits_runs_at_full_blocks(local_store: StoreConfig) -> None:
    plans = BlockStore(open_objects(local_store)).plan(RECIPE, {"p": range(5), "q": range(2)}, 3)
    assert [plan.ranges for plan in plans] == [
        (RowRange("p", 0, 3),),
        (RowRange("p", 3, 2), RowRange("q", 0, 1)),
        (RowRange("q", 1, 1),),
    ]


def test_row_ranges_read_like_a_list_of_ranges() -> None:
    ranges = RowRanges([("p", 0, 3), ("q", 2, 1)])
    assert list(ranges) == [RowRange("p", 0, 3), RowRange("q", 2, 1)]
    assert (len(ranges), len(RowRanges())) == (2, 0)
    assert ranges == RowRanges(iter(list(ranges)))
    assert ranges != RowRanges([("p", 0, 3), ("q", 2, 2)])
    assert [ranges.indices(key) for key in "pqr"] == [{0, 1, 2}, {2}, set()]


@given(st.text(), st.lists(st.tuples(st.text(), st.integers(0, 2**31), st.integers(1, 2**31))))
def test_a_block_is_named_as_any_json_is(key: str, runs: list[tuple[str, int, int]]) -> None:
    assert block_id(key, runs) == digest_json([key, runs])


_SCATTERED = st.sets(st.integers(0, 25)).map(lambda found: tuple(sorted(found)))
_ASKED: st.SearchStrategy[Sequence[int]] = st.one_of(
    st.integers(0, 25).map(range),
    st.tuples(st.integers(0, 9), st.integers(9, 25)).map(lambda r: range(*r)),
    _SCATTERED,
)


@given(
    st.lists(st.lists(st.tuples(st.sampled_from("pqrz"), st.integers(0, 20), st.integers(1, 6)), max_size=5)),
    st.dictionaries(st.sampled_from("pqrs"), _ASKED),
)
def test_what_is_missing_is_what_is_asked_less_what_is_there(
    there: list[list[tuple[str, int, int]]], asked: dict[str, Sequence[int]]
) -> None:
    blocks = [BlockManifest("b", RowRanges(runs), 0, "f", "d", 0, 0.0, "now", "0") for runs in there]
    missing = missing_ranges(asked, blocks)
    assert all(
        type(value) is int for row_range in missing for value in row_range[1:]
    )  # they are stored as JSON
    left = [
        (row_range.key, index)
        for row_range in missing
        for index in range(row_range.first, row_range.first + row_range.count)
    ]
    covered = {(key, index) for runs in there for key, first, n in runs for index in range(first, first + n)}
    wanted = [(key, index) for key, indices in asked.items() for index in indices]
    assert left == [pair for pair in wanted if pair not in covered]
