"""Rows with a status that can pass: asked for again, once a run, as often as they may; the others never."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import DamagedError
from qrpo_core.common.schemas import RETRYABLE, REWARDS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import from_json
from qrpo_core.store.blocks.planning import BlockPlan, RowRange, Wanted
from qrpo_core.store.recipe import Recipe

RECIPE = Recipe("reward", 1, {"kind": "judge"}, {"completions": "c"})
WANTED: Wanted = {"p": range(4), "q": range(2)}
RowId = tuple[str, int]


def rows(pairs: Sequence[RowId], away: Mapping[RowId, str], value: float = 1.0) -> pa.Table:
    """REWARDS rows: those in `away` have that status and no reward."""
    status = [away.get(pair, "ok") for pair in pairs]
    return pa.table(
        {
            "prompt_id": [key for key, _ in pairs],
            "sample_index": pa.array([index for _, index in pairs], pa.int32()),
            "ground_truth_digest": [""] * len(pairs),
            "reward": pa.array([value if each == "ok" else None for each in status], pa.float64()),
            "status": status,
            "detail": ["" if each == "ok" else f"{each} {value}" for each in status],
        }
    )


def commit(blocks: BlockStore, plan: BlockPlan, away: Mapping[RowId, str], value: float = 1.0) -> None:
    blocks.commit(plan, rows(list(plan.row_ids()), away, value), REWARDS, 0.1)


def run(
    objects: Objects,
    away: Mapping[RowId, str],
    value: float = 1.0,
    *,
    wanted: Wanted = WANTED,
    tries: int = 3,
) -> list[RowId]:
    """One run of its own; returns the rows that it asked for."""
    blocks = BlockStore(objects, StoreConfig(tries=tries))
    asked: list[RowId] = []
    while plans := blocks.plan(RECIPE, wanted, 4):
        for plan in plans:
            asked += plan.row_ids()
            commit(blocks, plan, away, value)
    return asked


def rewards(objects: Objects, wanted: Wanted = WANTED) -> dict[RowId, tuple[str, float | None, str]]:
    table = BlockStore(objects).read(RECIPE, wanted, REWARDS)
    return {
        (row["prompt_id"], row["sample_index"]): (row["status"], row["reward"], row["detail"])
        for row in table.to_pylist()
    }


def pairs_of(wanted: Wanted) -> list[RowId]:
    return [(key, index) for key, indices in wanted.items() for index in indices]


class TestTriedAgain:
    def test_only_what_can_pass_is_asked_for_again_and_a_settled_row_never_changes(
        self, objects: Objects
    ) -> None:
        away = dict(zip(pairs_of(WANTED), RETRYABLE, strict=False)) | {("q", 1): "parse_error"}
        assert sorted(run(objects, away, 1.0)) == pairs_of(WANTED)
        assert sorted(run(objects, {}, 2.0)) == [("p", 0), ("p", 1), ("p", 2)]
        assert run(objects, {}, 3.0) == []
        found = rewards(objects)
        assert {pair: reward for pair, (_, reward, _) in found.items()} == {
            ("p", 0): 2.0,
            ("p", 1): 2.0,
            ("p", 2): 2.0,
            ("p", 3): 1.0,
            ("q", 0): 1.0,
            ("q", 1): None,
        }
        assert found["q", 1][0] == "parse_error"

    def test_a_whole_block_of_them_is_committed_again_beside_the_first(self, objects: Objects) -> None:
        away = dict.fromkeys(pairs_of(WANTED), "timeout")
        for value in (1.0, 2.0):
            run(objects, away, value)
        blocks = BlockStore(objects).committed(RECIPE)
        assert sorted(block.generation for block in blocks) == [1, 1, 2, 2]
        assert len({block.block for block in blocks}) == 4
        # The newest says how it stands.
        assert set(rewards(objects).values()) == {("timeout", None, "timeout 2.0")}

    def test_tries_end_and_a_larger_number_asks_again(self, objects: Objects) -> None:
        away = {("p", 1): "endpoint_error"}
        counts = [len(run(objects, away, tries=2)) for _ in range(4)]
        assert counts == [6, 1, 0, 0]
        left = BlockStore(objects, StoreConfig(tries=2)).missing(RECIPE, WANTED)
        assert (left.absent, left.retried, [*left.given_up]) == ([], {}, [("p", 1)])
        assert left.given_up["p", 1].status == "endpoint_error"
        assert run(objects, {}, 5.0, tries=3) == [("p", 1)]
        assert rewards(objects)["p", 1] == ("ok", 5.0, "")

    def test_a_run_asks_once_and_the_next_run_of_the_same_process_again(self, objects: Objects) -> None:
        away, blocks = {("p", 0): "timeout"}, BlockStore(objects)
        for plan in blocks.plan(RECIPE, WANTED, 8):
            commit(blocks, plan, away)
        assert blocks.plan(RECIPE, WANTED, 8) == []
        assert [*blocks.retryable(RECIPE)] == [("p", 0)]
        blocks.begin_run()
        (plan,) = blocks.plan(RECIPE, WANTED, 8)
        assert (plan.ranges, plan.generation) == ((RowRange("p", 0, 1),), 2)

    def test_new_rows_and_rows_that_are_tried_again_lie_in_blocks_of_their_own(
        self, objects: Objects
    ) -> None:
        run(objects, {("p", 0): "timeout", ("p", 3): "timeout"})
        plans = BlockStore(objects).plan(RECIPE, {"p": range(6), "q": range(2)}, 8)
        assert [(plan.ranges, plan.generation) for plan in plans] == [
            ((RowRange("p", 4, 2),), 1),
            ((RowRange("p", 0, 1), RowRange("p", 3, 1)), 2),
        ]


class TestBeside:
    def test_two_runs_that_try_one_row_buy_it_once(self, objects: Objects) -> None:
        run(objects, {("p", 2): "endpoint_error"})
        one, two = BlockStore(objects), BlockStore(objects)
        (first,), (second,) = (blocks.plan(RECIPE, WANTED, 8) for blocks in (one, two))
        assert first.id == second.id
        assert two.still_missing(second) is not None
        commit(one, first, {}, 7.0)
        assert two.still_missing(second) is None
        commit(two, second, {}, 8.0)  # it had begun before: the first one's stays
        assert two.plan(RECIPE, WANTED, 8) == []
        assert rewards(objects)["p", 2][1] == 7.0

    def test_another_packing_of_the_same_rows_is_seen_as_well(self, objects: Objects) -> None:
        run(objects, {("p", 2): "timeout", ("q", 0): "timeout"})
        one, two = BlockStore(objects), BlockStore(objects)
        (both,) = one.plan(RECIPE, WANTED, 8)
        single, other = two.plan(RECIPE, WANTED, 1)
        commit(two, single, {("p", 2): "timeout"}, 7.0)
        left = one.still_missing(both)
        assert left is not None
        assert left.ranges == other.ranges  # what the other run has just tried waits for the next run
        commit(one, both, {}, 8.0)
        assert rewards(objects)["q", 0][1] == 8.0
        assert run(objects, {}, 9.0) == [("p", 2)]

    def test_a_damaged_second_try_leaves_the_row_to_be_tried(self, objects: Objects) -> None:
        run(objects, {("p", 2): "timeout"})
        run(objects, {}, 2.0)
        hurt = next(block for block in BlockStore(objects).committed(RECIPE) if block.generation == 2)
        objects.write(hurt.file, b"nothing of the kind")
        with pytest.raises(DamagedError, match="damaged"):
            rewards(objects)
        assert rewards(objects)["p", 2][0] == "timeout"
        assert run(objects, {}, 3.0) == [("p", 2)]
        assert rewards(objects)["p", 2][1] == 3.0

    def test_a_damaged_first_try_takes_no_row_of_the_second(self, objects: Objects) -> None:
        run(objects, {("p", 2): "timeout"})
        run(objects, {("p", 2): "timeout"}, 2.0)
        hurt = next(block for block in BlockStore(objects).committed(RECIPE) if block.rows == 4)
        assert hurt.retryable
        BlockStore(objects).quarantine(hurt, "for a test")
        assert sorted(run(objects, {}, 3.0)) == [("p", index) for index in range(4)]
        assert run(objects, {}) == []

    @pytest.mark.parametrize("rows_per_block", [2, 8])
    def test_compaction_keeps_rewards_and_tries(self, objects: Objects, rows_per_block: int) -> None:
        run(objects, dict.fromkeys(pairs_of(WANTED)[:3], "timeout"), 1.0)
        run(objects, {("p", 1): "timeout"}, 2.0)
        before, blocks = rewards(objects), BlockStore(objects)
        tries = {pair: tried.tries for pair, tried in blocks.retryable(RECIPE).items()}
        assert tries == {("p", 1): 2}
        blocks.compact(RECIPE, rows_per_block)
        assert rewards(objects) == before
        for fresh in (blocks, BlockStore(objects)):
            assert {pair: tried.tries for pair, tried in fresh.retryable(RECIPE).items()} == tries
        assert run(objects, {("p", 1): "timeout"}, 3.0) == [("p", 1)]
        assert run(objects, {}, 4.0) == []  # three times is as often as it may
        BlockStore(objects).compact(RECIPE, rows_per_block)
        assert run(objects, {}, 4.0, tries=4) == [("p", 1)]
        assert rewards(objects)["p", 1][1] == 4.0
        compacted = BlockStore(objects)
        compacted.compact(RECIPE, rows_per_block)
        assert rewards(objects)["p", 1][1] == 4.0
        assert compacted.retryable(RECIPE) == {}


@pytest.mark.parametrize(
    "hurt",
    [
        {"retryable": [["p", 0, 9, 1, "timeout"]]},
        {"retryable": [["z", 0, 1, 1, "timeout"]]},
        {"retryable": [["p", 0, 1, 0, "timeout"]]},
        {"retryable": [["p", 0]]},
        {"generation": 2},
    ],
)
def test_a_manifest_that_claims_what_it_has_not_is_damaged(tmp_path: Path, hurt: dict[str, object]) -> None:
    objects = open_objects(StoreConfig(path=str(tmp_path)))
    run(objects, {("p", 0): "timeout"})
    block = next(block for block in BlockStore(objects).committed(RECIPE) if block.retryable)
    raw = json.loads(objects.read(block.manifest_key))
    assert from_json(json.dumps(raw).encode(), block.manifest_key, "here") == block
    with pytest.raises(DamagedError):
        from_json(json.dumps(raw | hurt).encode(), block.manifest_key, "here")


_STATUS = st.sampled_from(["ok", "parse_error", *RETRYABLE])
_STEP = st.one_of(
    st.just("compact"),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.dictionaries(st.integers(0, 5), _STATUS)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(_STEP, max_size=6), st.integers(1, 3))
def test_runs_and_compactions_in_any_order(steps: list[object], tries: int) -> None:
    """Against a table in memory: no settled row is bought again, none that can pass is forgotten."""
    with TemporaryDirectory() as folder:
        objects = open_objects(StoreConfig(path=folder))
        known: dict[RowId, tuple[str, float | None]] = {}
        tried: dict[RowId, int] = {}
        for number, step in enumerate(steps):
            if step == "compact":
                BlockStore(objects).compact(RECIPE, 4)
            else:
                first, second, drawn = step  # type: ignore[misc]
                wanted = {"p": range(first), "q": range(second)}
                status = dict(zip(pairs_of({"p": range(3), "q": range(2)}), range(6), strict=False))
                away = {
                    pair: drawn[place] for pair, place in status.items() if drawn.get(place, "ok") != "ok"
                }
                expected = {
                    pair
                    for pair in pairs_of(wanted)
                    if pair not in known or (known[pair][0] in RETRYABLE and tried[pair] < tries)
                }
                asked = run(objects, away, float(number), wanted=wanted, tries=tries)
                assert sorted(asked) == sorted(expected)
                for pair in asked:
                    state = away.get(pair, "ok")
                    known[pair] = (state, float(number) if state == "ok" else None)
                    tried[pair] = tried.get(pair, 0) + 1
            held: dict[str, list[int]] = {}
            for key, index in sorted(known):
                held.setdefault(key, []).append(index)
            found = rewards(objects, held)
            assert {pair: row[:2] for pair, row in found.items()} == known
