"""Blocks on both back ends: nothing paid for is lost, bought twice or mixed up."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.config import StoreConfig
from qrpo_core.errors import AccessError, DamagedError, MissingError, StoreError
from qrpo_core.ids import digest_json
from qrpo_core.records import LOGPROBS
from qrpo_core.store import block_manifest
from qrpo_core.store.block_manifest import BlockManifest
from qrpo_core.store.blocks import Blocks, Run, Runs, missing_runs
from qrpo_core.store.objects import Objects, open_objects
from qrpo_core.store.planning import block_id
from qrpo_core.store.recipe import Recipe
from tests.faults.rows import RECIPE, Dying, Killed, commit, fill, read, rows

FIVE = {"p": range(3), "q": range(2)}


def damage(objects: Objects, key: str, how: str) -> None:
    """Flip a byte of an object, cut it, or remove it."""
    data = bytearray(objects.read(key))
    if how == "missing":
        objects.delete(key)
    elif how == "truncated":
        objects.write(key, bytes(data[: len(data) // 2]))
    else:
        data[len(data) // 2] ^= 1
        objects.write(key, bytes(data))


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


class TestCommit:
    def test_a_block_must_hold_the_planned_rows(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        plan = blocks.plan(RECIPE, {"p": range(2)}, 4)[0]
        for wrong in ([("p", 0)], [("p", 0), ("p", 2)], [("p", 0), ("p", 0)], [("p", 0), ("p", 1), ("p", 1)]):
            with pytest.raises(StoreError, match="planned"):
                blocks.commit(plan, rows(wrong), LOGPROBS, 0.1)
        assert blocks.committed(RECIPE) == []

    def test_the_loser_of_a_race_takes_the_winners_block(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 4)[0]
        winner = commit(one, plan, 1.0)
        assert commit(two, plan, 2.0) == winner
        assert commit(Blocks(objects), plan, 3.0, exact=True) == winner
        assert read(two, {"p": range(2)})["logprob"].to_pylist() == [1.0, 0.0]

    def test_two_results_of_a_reproducible_step_are_refused(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        plan = blocks.plan(RECIPE, {"p": range(3)}, 4)[0]
        winner = commit(blocks, plan, exact=True)
        assert commit(Blocks(objects), plan, exact=True) == winner
        table = rows(list(plan.pairs()))
        table = table.set_column(2, "logprob", pa.array([0.0, -1.0, 7.0]))
        with pytest.raises(StoreError, match="row p:2 is the first to differ") as error:
            Blocks(objects).commit(plan, table, LOGPROBS, 0.1, exact=True)
        assert winner.digest in str(error.value)
        assert winner.file in str(error.value)
        others = set(objects.keys(f"{RECIPE.blocks_path}/rows")) - {winner.file}
        assert len(others) == 1
        assert others.pop() in str(error.value)
        assert read(Blocks(objects), {"p": range(3)})["logprob"].to_pylist() == [0.0, -1.0, -2.0]

    def test_a_damaged_winner_gives_way_to_the_same_rows(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        plan = blocks.plan(RECIPE, {"p": range(3)}, 4)[0]
        winner = commit(blocks, plan, 5.0, exact=True)
        objects.delete(winner.file)
        commit(Blocks(objects), plan, 1.0, exact=True)
        assert read(Blocks(objects), {"p": range(3)})["logprob"].to_pylist() == [1.0, 0.0, -1.0]
        assert [aside.block for aside in blocks.aside()] == [winner.block]

    def test_what_others_committed_meanwhile_is_left_out(self, objects: Objects) -> None:
        """Two runs with other budgets: a row that may come out differently is there once."""
        one, two = Blocks(objects), Blocks(objects)
        small, large = one.plan(RECIPE, {"p": range(2)}, 8)[0], two.plan(RECIPE, {"p": range(4)}, 8)[0]
        other = two.plan(RECIPE, {"p": (1, 3)}, 8)[0]
        winner = commit(one, small, 1.0)
        made = commit(two, large, 2.0)
        assert list(made.runs) == [Run("p", 2, 2)]
        assert commit(Blocks(objects), large, 3.0) in (winner, made)
        assert commit(Blocks(objects), other, 4.0) in (winner, made)
        for blocks in (one, two, Blocks(objects)):
            assert read(blocks, {"p": range(4)})["logprob"].to_pylist() == [1.0, 0.0, 0.0, -1.0]
        assert len(one.committed(RECIPE)) == 2

    def test_a_row_that_is_twice_there_is_the_same_for_every_reader(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        small, large = one.plan(RECIPE, {"p": range(2)}, 8)[0], two.plan(RECIPE, {"p": range(4)}, 8)[0]
        commit(one, small, 1.0, exact=True)
        commit(two, large, 2.0, exact=True)
        table = read(one, {"p": range(4)})
        assert table["sample_index"].to_pylist() == [0, 1, 2, 3]
        pairs = [("p", 3), ("p", 0), ("p", 1)]
        for blocks in (one, two, Blocks(objects)):
            assert read(blocks, {"p": range(4)}).equals(table)
            assert read(blocks, {"p": (0, 1)}).equals(table.slice(0, 2))
            assert blocks.read_pairs(RECIPE, pairs, LOGPROBS).equals(table.take([3, 0, 1]))

    def test_killed_anywhere_a_block_is_there_whole_or_not_at_all(self, store: StoreConfig) -> None:
        for changes in count():
            config = store.model_copy(update={"path": f"{store.path}/{changes}"})
            objects = open_objects(config)
            killed = False
            try:
                fill(Blocks(Dying(objects, changes)), {"p": range(3)})  # type: ignore[arg-type]
            except Killed:
                killed = True
            assert fill(Blocks(objects), {"p": range(3)}) == (3 if killed else 0)
            assert read(Blocks(objects), {"p": range(3)}).num_rows == 3
            if not killed:
                break
        assert changes == 3  # the recipe, the data, and the manifest, which makes it real

    def test_16_threads_at_the_same_blocks_end_with_one_each(self, store: StoreConfig) -> None:
        def work(_: int) -> int:
            return fill(Blocks(open_objects(store)), {"p": range(8), "q": range(5)}, exact=True)

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(work, range(16))) >= 13
        blocks = Blocks(open_objects(store))
        assert sum(block.rows for block in blocks.committed(RECIPE)) == 13

    @pytest.mark.slow
    def test_16_processes_at_the_same_blocks_end_with_one_each(
        self, store: StoreConfig, tmp_path: Path
    ) -> None:
        go = tmp_path / "go"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", RACER, store.model_dump_json(), str(go)]
        racers = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(16)
        ]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        go.touch()
        told = [racer.communicate(timeout=120) for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * 16, told
        manifests = {out for out, _ in told}
        assert len(manifests) == 1  # all 16 name the same blocks, with the same digests
        blocks = Blocks(open_objects(store))
        assert sum(block.rows for block in blocks.committed(RECIPE)) == 64
        assert len(list(blocks.objects.keys(f"{RECIPE.blocks_path}/rows"))) == 8
        table = read(blocks, {"p": range(64)})
        assert table["logprob"].to_pylist() == [-float(i) for i in range(64)]


#: Races for the blocks of 64 rows as soon as the file `go` is there; prints the blocks it ends with.
RACER = """
import sys, time
from pathlib import Path
from qrpo_core.config import StoreConfig
from qrpo_core.store.blocks import Blocks
from qrpo_core.store.objects import open_objects
from tests.faults.rows import RECIPE, commit
blocks = Blocks(open_objects(StoreConfig.model_validate_json(sys.argv[1])))
plans = blocks.plan(RECIPE, {"p": range(64)}, 8)
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
print(sorted((block.block, block.digest) for block in [commit(blocks, plan) for plan in plans]))
"""


class TestDamage:
    @pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
    @pytest.mark.parametrize("reader", ["read", "read_pairs"])
    def test_a_damaged_block_is_told_set_aside_and_made_again(
        self, objects: Objects, how: str, reader: str
    ) -> None:
        blocks = Blocks(objects)
        fill(blocks, FIVE, rows_per_block=3)
        before = read(blocks, FIVE)
        hurt = next(block for block in blocks.committed(RECIPE) if block.rows == 3)
        damage(objects, hurt.file, how)
        fresh = Blocks(objects)
        calls = {
            "read": lambda: read(fresh, FIVE),
            "read_pairs": lambda: fresh.read_pairs(RECIPE, [("q", 0), ("p", 2)], LOGPROBS),
        }
        told = "3 rows are set aside, the first of them p:0, p:1, p:2"
        with pytest.raises(DamagedError, match=told) as error:
            calls[reader]()
        assert hurt.block in str(error.value)
        assert "only these rows are made again" in str(error.value)
        for again in (fresh, blocks, Blocks(objects)):
            assert [plan.runs for plan in again.plan(RECIPE, FIVE, 3)] == [(Run("p", 0, 3),)]
        assert fill(fresh, FIVE, rows_per_block=3) == 3
        for again in (fresh, blocks, Blocks(objects)):
            assert read(again, FIVE).equals(before)
        (aside,) = fresh.aside()
        assert (aside.block, aside.rows, aside.step, aside.key) == (hurt.block, 3, "logprob", RECIPE.key)
        assert aside.path == f"aside/logprob/{RECIPE.key}/{hurt.block}.json"
        assert aside.why in str(error.value)
        assert json.loads(objects.read(aside.path))["manifest"]["digest"] == hurt.digest

    def test_all_damaged_blocks_are_told_at_once(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(12)})
        for block in blocks.committed(RECIPE)[:2]:
            damage(objects, block.file, "flipped")
        with pytest.raises(DamagedError, match=r"2 blocks are damaged .* 8 rows are set aside"):
            read(blocks, {"p": range(12)})
        assert fill(blocks, {"p": range(12)}) == 8

    def test_a_block_that_is_damaged_twice_is_set_aside_twice(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        for number in range(2):
            plan = blocks.plan(RECIPE, {"p": range(2)}, 2)[0]
            block = blocks.commit(plan, rows(list(plan.pairs())), LOGPROBS, number)
            damage(objects, block.file, "missing")
            with pytest.raises(DamagedError):
                read(blocks, {"p": range(2)})
        assert [aside.path.endswith("-2.json") for aside in blocks.aside()] == [True, False]

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"\xff\xfe", b"null", "cut", "other rows", "row count", "other recipe"],
        ids=str,
    )
    def test_a_damaged_manifest_is_set_aside_and_planned_again(
        self, objects: Objects, content: bytes | str, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(Blocks(objects), FIVE, rows_per_block=3)
        before = read(Blocks(objects), FIVE)
        hurt = next(block for block in Blocks(objects).committed(RECIPE) if block.rows == 3)
        raw = objects.read(hurt.index)
        swaps = {
            "cut": raw[:-20],
            "other rows": raw.replace(b'["p",0,3]', b'["p",1,3]'),
            "row count": raw.replace(b'"rows":3', b'"rows":4'),
            "other recipe": raw.replace(RECIPE.key.encode(), b"0" * 32),
        }
        objects.write(hurt.index, swaps[content] if isinstance(content, str) else content)
        blocks = Blocks(objects)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            assert [plan.runs for plan in blocks.plan(RECIPE, FIVE, 3)] == [(Run("p", 0, 3),)]
        assert hurt.index in caplog.text
        assert [aside.entry for aside in blocks.aside()] == [hurt.index]
        assert fill(blocks, FIVE, rows_per_block=3) == 3
        assert read(Blocks(objects), FIVE).equals(before)

    def test_a_store_that_may_only_be_read_is_planned_on(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(Blocks(objects), FIVE, rows_per_block=3)
        damaged = Blocks(objects).committed(RECIPE)
        objects.write(damaged[0].index, b"")
        damage(objects, damaged[1].file, "missing")

        def refused(*_: object) -> None:
            raise AccessError("not allowed")

        monkeypatch.setattr(objects, "create", refused)
        monkeypatch.setattr(objects, "delete", refused)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            planned = Blocks(objects).plan(RECIPE, FIVE, 8)
        assert sum(plan.rows for plan in planned) == damaged[0].rows
        assert "Left out" in caplog.text
        with pytest.raises(DamagedError, match=r"are lost.*could not be set aside"):
            read(Blocks(objects), FIVE)

    def test_a_manifest_of_a_newer_format_is_left_alone(self, objects: Objects) -> None:
        fill(Blocks(objects), {"p": range(2)})
        (block,) = Blocks(objects).committed(RECIPE)
        raw = json.loads(objects.read(block.index)) | {"format": 2}
        objects.write(block.index, json.dumps(raw).encode())
        with pytest.raises(StoreError, match="another format"):
            Blocks(objects).plan(RECIPE, {"p": range(2)}, 2)
        assert objects.exists(block.index)

    def test_a_fresh_block_is_not_set_aside_for_an_old_one(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 2)[0]
        old = commit(one, plan, 1.0)
        two.set_aside(old, "for a test")
        fresh = two.commit(plan, rows(list(plan.pairs()), 2.0), LOGPROBS, 99.0)
        objects.delete(old.file)  # so that the first reader finds its block damaged
        assert read(one, {"p": range(2)})["logprob"].to_pylist() == [2.0, 1.0]
        assert one.set_aside(old, "late") == ""
        assert two.committed(RECIPE) == [fresh]

    def test_how_often_content_is_compared(self, store: StoreConfig) -> None:
        objects = open_objects(store)
        wanted = {"p": range(60)}
        fill(Blocks(objects), wanted, rows_per_block=1)
        for block in Blocks(objects).committed(RECIPE):
            file = bytearray(objects.read(block.file))
            at = bytes(file).rindex(b"parquet-cpp")  # who wrote it: still a table of these rows
            file[at] ^= 1
            objects.write(block.file, bytes(file))
        never = Blocks(objects, store.model_copy(update={"verify": "never"}))
        assert read(never, wanted).num_rows == 60
        sampled = Blocks(objects, store.model_copy(update={"verify": "sampled"}))
        with pytest.raises(DamagedError, match="blocks are damaged"):
            read(sampled, wanted)
        lost = len(list(sampled.aside()))
        assert 1 <= lost <= 15
        with pytest.raises(DamagedError):
            read(Blocks(objects), {"p": range(59)} | {"q": ()})
        assert len(list(sampled.aside())) == 60

    @pytest.mark.parametrize("how", ["truncated", "missing"])
    def test_what_is_gone_is_noticed_without_comparing(self, store: StoreConfig, how: str) -> None:
        objects = open_objects(store)
        never = Blocks(objects, store.model_copy(update={"verify": "never"}))
        fill(never, {"p": range(2)})
        damage(objects, never.committed(RECIPE)[0].file, how)
        with pytest.raises(DamagedError):
            read(never, {"p": range(2)})

    def test_verify_looks_at_everything_and_changes_nothing(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(16)})
        there = blocks.committed(RECIPE)
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4
        damage(objects, there[0].file, "flipped")
        damage(objects, there[1].file, "missing")
        damage(objects, there[2].index, "truncated")
        before = list(objects.keys(""))
        checks = {check.key: check for check in blocks.verify(RECIPE)}
        assert list(objects.keys("")) == before
        assert [checks[block.index].damage != "" for block in there] == [True, True, True, False]
        assert [checks[block.index].manifest for block in there] == [there[0], there[1], None, there[3]]
        assert sum(check.rows for check in checks.values()) == 12
        for check in checks.values():
            if check.damage:
                assert blocks.set_aside(check.manifest or check.key, check.damage)
        assert fill(blocks, {"p": range(16)}) == 12
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4


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
