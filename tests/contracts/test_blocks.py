"""Commits of blocks on both back ends: nothing is bought twice or mixed up, whoever races or dies."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest

from qrpo_core.common.errors import StoreError
from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.planning import RowRange
from tests.faults.rows import RECIPE, Dying, Killed, commit, fill, read, rows


class TestCommit:
    def test_a_block_must_hold_the_planned_rows(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        plan = blocks.plan(RECIPE, {"p": range(2)}, 4)[0]
        for wrong in ([("p", 0)], [("p", 0), ("p", 2)], [("p", 0), ("p", 0)], [("p", 0), ("p", 1), ("p", 1)]):
            with pytest.raises(StoreError, match="planned"):
                blocks.commit(plan, rows(wrong), LOGPROBS, 0.1)
        assert blocks.committed(RECIPE) == []

    def test_the_loser_of_a_race_takes_the_winners_block(self, objects: Objects) -> None:
        one, two = BlockStore(objects), BlockStore(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 4)[0]
        winner = commit(one, plan, 1.0)
        assert commit(two, plan, 2.0) == winner
        assert commit(BlockStore(objects), plan, 3.0, exact=True) == winner
        assert read(two, {"p": range(2)})["logprob"].to_pylist() == [1.0, 0.0]

    def test_two_results_of_a_reproducible_step_are_refused(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        plan = blocks.plan(RECIPE, {"p": range(3)}, 4)[0]
        winner = commit(blocks, plan, exact=True)
        assert commit(BlockStore(objects), plan, exact=True) == winner
        table = rows(list(plan.row_ids()))
        table = table.set_column(2, "logprob", pa.array([0.0, -1.0, 7.0]))
        with pytest.raises(StoreError, match="row p:2 is the first to differ") as error:
            BlockStore(objects).commit(plan, table, LOGPROBS, 0.1, exact=True)
        assert winner.digest in str(error.value)
        assert winner.file in str(error.value)
        others = set(objects.keys(f"{RECIPE.blocks_path}/rows")) - {winner.file}
        assert len(others) == 1
        assert others.pop() in str(error.value)
        assert read(BlockStore(objects), {"p": range(3)})["logprob"].to_pylist() == [0.0, -1.0, -2.0]

    def test_a_damaged_winner_gives_way_to_the_same_rows(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        plan = blocks.plan(RECIPE, {"p": range(3)}, 4)[0]
        winner = commit(blocks, plan, 5.0, exact=True)
        objects.delete(winner.file)
        commit(BlockStore(objects), plan, 1.0, exact=True)
        assert read(BlockStore(objects), {"p": range(3)})["logprob"].to_pylist() == [1.0, 0.0, -1.0]
        assert [quarantined.block for quarantined in blocks.quarantined()] == [winner.block]

    def test_what_others_committed_meanwhile_is_left_out(self, objects: Objects) -> None:
        """Two runs with other budgets: a row that may come out differently is there once."""
        one, two = BlockStore(objects), BlockStore(objects)
        small, large = one.plan(RECIPE, {"p": range(2)}, 8)[0], two.plan(RECIPE, {"p": range(4)}, 8)[0]
        other = two.plan(RECIPE, {"p": (1, 3)}, 8)[0]
        winner = commit(one, small, 1.0)
        made = commit(two, large, 2.0)
        assert list(made.ranges) == [RowRange("p", 2, 2)]
        assert commit(BlockStore(objects), large, 3.0) in (winner, made)
        assert commit(BlockStore(objects), other, 4.0) in (winner, made)
        for blocks in (one, two, BlockStore(objects)):
            assert read(blocks, {"p": range(4)})["logprob"].to_pylist() == [1.0, 0.0, 0.0, -1.0]
        assert len(one.committed(RECIPE)) == 2

    def test_a_row_that_is_twice_there_is_the_same_for_every_reader(self, objects: Objects) -> None:
        one, two = BlockStore(objects), BlockStore(objects)
        small, large = one.plan(RECIPE, {"p": range(2)}, 8)[0], two.plan(RECIPE, {"p": range(4)}, 8)[0]
        commit(one, small, 1.0, exact=True)
        commit(two, large, 2.0, exact=True)
        table = read(one, {"p": range(4)})
        assert table["sample_index"].to_pylist() == [0, 1, 2, 3]
        pairs = [("p", 3), ("p", 0), ("p", 1)]
        for blocks in (one, two, BlockStore(objects)):
            assert read(blocks, {"p": range(4)}).equals(table)
            assert read(blocks, {"p": (0, 1)}).equals(table.slice(0, 2))
            assert blocks.read_rows(RECIPE, pairs, LOGPROBS).equals(table.take([3, 0, 1]))

    def test_killed_anywhere_a_block_is_there_whole_or_not_at_all(self, store: StoreConfig) -> None:
        for changes in count():
            config = store.model_copy(update={"path": f"{store.path}/{changes}"})
            objects = open_objects(config)
            killed = False
            try:
                fill(BlockStore(Dying(objects, changes)), {"p": range(3)})  # type: ignore[arg-type]
            except Killed:
                killed = True
            assert fill(BlockStore(objects), {"p": range(3)}) == (3 if killed else 0)
            assert read(BlockStore(objects), {"p": range(3)}).num_rows == 3
            if not killed:
                break
        assert changes == 4  # recipe, data, announcement, and the manifest, which makes it real

    def test_16_threads_at_the_same_blocks_end_with_one_each(self, store: StoreConfig) -> None:
        def work(_: int) -> int:
            return fill(BlockStore(open_objects(store)), {"p": range(8), "q": range(5)}, exact=True)

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(work, range(16))) >= 13
        blocks = BlockStore(open_objects(store))
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
        blocks = BlockStore(open_objects(store))
        assert sum(block.rows for block in blocks.committed(RECIPE)) == 64
        assert len(list(blocks.objects.keys(f"{RECIPE.blocks_path}/rows"))) == 8
        table = read(blocks, {"p": range(64)})
        assert table["logprob"].to_pylist() == [-float(i) for i in range(64)]


#: Races for the blocks of 64 rows as soon as the file `go` is there; prints the blocks it ends with.
RACER = """
import sys, time
from pathlib import Path
from qrpo_core.config import StoreConfig
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.backends.opening import open_objects
from tests.faults.rows import RECIPE, commit
blocks = BlockStore(open_objects(StoreConfig.model_validate_json(sys.argv[1])))
plans = blocks.plan(RECIPE, {"p": range(64)}, 8)
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
print(sorted((block.block, block.digest) for block in [commit(blocks, plan) for plan in plans]))
"""
