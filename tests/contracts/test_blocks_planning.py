"""What is planned, in blocks of which size, and read: on both back ends, and as laws of runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.config import StoreConfig
from qrpo_core.errors import MissingError
from qrpo_core.ids import digest_json
from qrpo_core.records import LOGPROBS
from qrpo_core.store import block_manifest
from qrpo_core.store.block_manifest import BlockManifest
from qrpo_core.store.blocks import Blocks, Run, Runs, missing_runs
from qrpo_core.store.objects import Objects, open_objects
from qrpo_core.store.planning import block_id
from qrpo_core.store.recipe import Recipe
from tests.faults.rows import RECIPE, commit, fill, read, rows

FIVE = {"p": range(3), "q": range(2)}


class TestPlanning:
    def test_a_larger_budget_computes_the_new_rows_only(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 6
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 0
        first = read(blocks, {"p": range(3), "q": range(3)})
        assert fill(blocks, {"p": range(6), "new": range(2), "q": range(3)}) == 5
        assert read(blocks, {"p": range(3), "q": range(3)}).equals(first)
        table = read(blocks, {"q": range(1), "p": range(6)})
        assert table["prompt_id"].to_pylist() == ["q"] + ["p"] * 6
        assert table["sample_index"].to_pylist() == [0, *range(6)]

    def test_scattered_rows_are_asked_for_and_read_alone(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        assert fill(blocks, {"p": (2, 3, 7), "q": range(1)}) == 4
        assert fill(blocks, {"p": (1, 3, 7)}) == 1
        assert fill(blocks, {"p": range(9)}) == 5
        table = read(blocks, {"q": (0,), "p": (3, 7)})
        assert table["prompt_id"].to_pylist() == ["q", "p", "p"]
        assert table["sample_index"].to_pylist() == [0, 3, 7]

    def test_a_fresh_reader_sees_the_same(self, objects: Objects) -> None:
        fill(Blocks(objects), {"p": range(5)})
        assert Blocks(objects).plan(RECIPE, {"p": range(5)}, 4) == []

    def test_rows_that_are_not_there_are_counted(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(2)})
        with pytest.raises(MissingError, match="3 of 5 rows"):
            read(blocks, {"p": range(5)})
        with pytest.raises(MissingError, match="row p:7"):
            blocks.read_pairs(RECIPE, [("p", 1), ("p", 7)], LOGPROBS)
        with pytest.raises(MissingError, match="row q:0"):
            blocks.read_pairs(RECIPE, [("q", 0)], LOGPROBS)

    def test_rows_are_read_in_the_order_of_pairs(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(5), "q": range(5)})
        pairs = [("q", 3), ("p", 4), ("q", 0), ("p", 4)]
        table = blocks.read_pairs(RECIPE, pairs, LOGPROBS)
        found = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        assert list(found) == pairs
        assert blocks.read_pairs(RECIPE, [], LOGPROBS).num_rows == 0

    def test_recipes_are_listed(self, objects: Objects) -> None:
        other = Recipe("reward", 2, {"a": [1]}, {"completions": RECIPE.key})
        fill(Blocks(objects), {"p": range(1)})
        commit(Blocks(objects), Blocks(objects).plan(other, {"p": range(1)}, 1)[0])
        assert Blocks(objects).recipes("logprob") == [RECIPE.to_dict()]
        assert Blocks(objects).all_recipes() == [RECIPE, other]

    def test_still_missing_is_what_nobody_committed_since(self, objects: Objects) -> None:
        mine, theirs = Blocks(objects), Blocks(objects)
        small, large = mine.plan(RECIPE, {"p": (1, 2, 5)}, 8)[0], mine.plan(RECIPE, FIVE, 8)[0]
        assert mine.still_missing(large) is large
        commit(theirs, small)
        left = mine.still_missing(large)
        assert left is not None
        assert left.runs == (Run("p", 0, 1), Run("q", 0, 2))
        assert mine.still_missing(small) is None
        commit(theirs, left)
        assert mine.still_missing(large) is None

    def test_what_was_known_when_a_plan_was_made_is_looked_through_no_more(self, objects: Objects) -> None:
        mine, theirs = Blocks(objects), Blocks(objects)
        fill(theirs, {"p": range(3)})
        plan = mine.plan(RECIPE, FIVE, 8)[0]
        assert plan.seen == {block.index for block in theirs.committed(RECIPE)}
        assert plan.runs == (Run("q", 0, 2),)
        new = commit(theirs, theirs.plan(RECIPE, {"q": range(1)}, 8)[0])
        left = mine.still_missing(plan)
        assert left is not None
        assert left.runs == (Run("q", 1, 1),)
        assert left.seen == plan.seen
        assert new.index not in plan.seen

    def test_a_clock_that_jumps_back_decides_nothing(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Early(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) - timedelta(days=366)

        blocks = Blocks(objects)
        (first,) = blocks.plan(RECIPE, {"p": range(4)}, 4)
        winner = commit(blocks, first, 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(block_manifest, "datetime", Early)
            assert commit(Blocks(objects), first, 9.0) == winner  # the earlier time wins no race
            (second,) = blocks.plan(RECIPE, {"p": range(8)}, 4)
            assert second.runs == (Run("p", 4, 4),)
            assert commit(blocks, second).created < (datetime.now(UTC) - timedelta(days=365)).isoformat()
        for fresh in (blocks, Blocks(objects)):
            assert fresh.plan(RECIPE, {"p": range(8)}, 4) == []
            assert read(fresh, {"p": range(8)})["sample_index"].to_pylist() == list(range(8))
        assert blocks.compact(RECIPE, 32).after == 1
        assert read(Blocks(objects), {"p": range(8)})["logprob"].to_pylist() == [-float(i) for i in range(8)]


class TestRates:
    def test_blocks_hold_minutes_of_work(self, store: StoreConfig) -> None:
        objects = open_objects(store)
        config = store.model_copy(update={"block_minutes": 2.0, "rows_per_block": 1000})
        blocks = Blocks(objects, config)
        assert (blocks.rate(RECIPE), blocks.measured(RECIPE), blocks.rows_for(RECIPE)) == (None, None, 64)
        plan = blocks.plan(RECIPE, {"p": range(10)}, 10)[0]
        blocks.commit(plan, rows(list(plan.pairs())), LOGPROBS, seconds=2.0)
        for fresh in (blocks, Blocks(objects, config)):
            assert fresh.rate(RECIPE) == 5.0
            assert fresh.rows_for(RECIPE) == 600
        assert Blocks(objects, store.model_copy(update={"rows_per_block": 100})).rows_for(RECIPE) == 100
        assert Blocks(objects, store.model_copy(update={"block_minutes": 0.001})).rows_for(RECIPE) == 16
        assert Blocks(objects, store.model_copy(update={"rows_per_block": 5})).rows_for(RECIPE) == 5

    def test_another_recipes_rate_tells_the_time_but_not_the_size(self, objects: Objects) -> None:
        plan = Blocks(objects).plan(RECIPE, {"p": range(10)}, 10)[0]
        Blocks(objects).commit(plan, rows(list(plan.pairs())), LOGPROBS, seconds=0.01)
        other = Recipe("logprob", 2)
        assert Blocks(objects).rate(other) == pytest.approx(1000)
        assert Blocks(objects).measured(other) is None
        assert Blocks(objects).rows_for(other) == 64
        assert Blocks(objects).rate(Recipe("sample", 1)) is None

    def test_only_the_newest_blocks_count_and_few_are_read(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blocks = Blocks(objects)
        for number, plan in enumerate(blocks.plan(RECIPE, {"p": range(40)}, 1)):
            blocks.commit(plan, rows(list(plan.pairs())), LOGPROBS, seconds=number + 1, exact=True)
        fresh, read_keys = Blocks(objects), []
        real = objects.read
        monkeypatch.setattr(objects, "read", lambda key: read_keys.append(key) or real(key))
        assert fresh.rate(Recipe("logprob", 2)) is not None
        assert len(read_keys) == 20


def test_pack_splits_runs_at_full_blocks(local_store: StoreConfig) -> None:
    plans = Blocks(open_objects(local_store)).plan(RECIPE, {"p": range(5), "q": range(2)}, 3)
    assert [plan.runs for plan in plans] == [
        (Run("p", 0, 3),),
        (Run("p", 3, 2), Run("q", 0, 1)),
        (Run("q", 1, 1),),
    ]


def test_runs_read_like_a_list_of_runs() -> None:
    runs = Runs([("p", 0, 3), ("q", 2, 1)])
    assert list(runs) == [Run("p", 0, 3), Run("q", 2, 1)]
    assert runs[:1] == [Run("p", 0, 3)]
    assert (len(runs), len(Runs())) == (2, 0)
    assert runs == Runs(iter(list(runs)))
    assert runs != Runs([("p", 0, 3), ("q", 2, 2)])


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
    blocks = [BlockManifest("b", Runs(runs), 0, "f", "d", 0, 0.0, "now", "0") for runs in there]
    missing = missing_runs(asked, blocks)
    assert all(type(value) is int for run in missing for value in run[1:])  # they are stored as JSON
    left = [(run.key, index) for run in missing for index in range(run.first, run.first + run.count)]
    covered = {(key, index) for runs in there for key, first, n in runs for index in range(first, first + n)}
    wanted = [(key, index) for key, indices in asked.items() for index in indices]
    assert left == [pair for pair in wanted if pair not in covered]
