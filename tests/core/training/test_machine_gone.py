"""A training is killed with SIGKILL, and its machine is gone: another one goes on from the store."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.log_tail import new_lines
from qrpo_core.config import StoreConfig
from qrpo_core.store.checkpoint_store import MARKER, CheckpointStore
from qrpo_core.store.recipe import Recipe
from qrpo_core.training.checkpoints import checkpoint_to_resume, seal
from qrpo_core.training.launch import HISTORY, PROGRESS, SETTINGS, read_job
from qrpo_core.training.run import train_here
from tests.core.training.test_distributed import EXAMPLES as EXAMPLES
from tests.core.training.test_distributed import Finished, assert_close, finish, kept, start
from tests.faults.proxy import Fault, FaultProxy

RECIPE = Recipe("train", 1, {}, {"policy": "a"})
HALVES = {"precision": "bf16", "weights_dtype": "bfloat16"}
LORA = {"lora_rank": 4, "lora_dropout": 0.2}

Run = Callable[..., Path]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def stored(request: pytest.FixtureRequest) -> CheckpointStore:
    return CheckpointStore(request.getfixturevalue(f"{request.param}_store"), RECIPE)


def kill_and_lose(server: ForkServerContext, job: Path, stored: CheckpointStore, processes: int = 1) -> int:
    """Train until the store has one more checkpoint, kill, and delete all but the job. Returns its step."""
    before = max((each.step for each in stored.complete()), default=0)
    started = start(server, job, processes)
    while (there := max((each.step for each in stored.complete()), default=0)) == before:
        assert all(process.is_alive() for process in started)
    for process in started:
        process.kill()
        process.join()
    assert not (job / HISTORY).exists()
    for path in job.iterdir():
        if path.name not in (SETTINGS, "items.arrow"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return there


def first_step(job: Path) -> int:
    """The first step that was reported."""
    return int(json.loads(next(new_lines(job / PROGRESS))[0])[0])


def same(one: Finished, other: Finished) -> bool:
    return one[0] == other[0] and all((one[1][name] == other[1][name]).all() for name in one[1])


@pytest.mark.parametrize(
    "training", [{}, LORA, pytest.param(HALVES, marks=pytest.mark.slow)], ids=["whole", "lora", "bfloat16"]
)
def test_another_machine_ends_with_the_same_numbers(
    server: ForkServerContext, make_job: Run, stored: CheckpointStore, training: dict[str, Any]
) -> None:
    job = make_job(stored, **training)
    there = kill_and_lose(server, job, stored)
    history, weights = finish(server, job, 1)
    assert first_step(job) > there
    assert same((history, weights), finish(server, make_job(**training), 1))


@pytest.mark.slow
def test_one_machine_goes_on_from_the_shards_of_two(
    server: ForkServerContext, make_job: Run, local_store: StoreConfig
) -> None:
    stored = CheckpointStore(local_store, RECIPE)
    job = make_job(stored, parallel="fsdp")
    there = kill_and_lose(server, job, stored, processes=2)
    again = kill_and_lose(server, job, stored, processes=1)
    assert again > there
    history, _ = finish(server, job, 2)
    assert first_step(job) > again
    assert_close(history, finish(server, make_job(), 1)[0])


@pytest.mark.slow
def test_a_store_that_is_away_costs_no_training(
    make_job: Run, s3_store: StoreConfig, s3_endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is away from step 2 to step 4."""
    with FaultProxy(s3_endpoint) as proxy:
        away = s3_store.model_copy(update={"endpoint_url": proxy.url, "retry_seconds": 0.5})

        def on_step(step: int, *_: Any) -> None:
            if step == 2:
                proxy.inject(Fault("slow_down", times=math.inf))
            if step == 4:
                proxy.clear()

        items, given = read_job(make_job(CheckpointStore(away, RECIPE)))
        with caplog.at_level(logging.WARNING, "qrpo.train"):
            done = train_here(items, **given, on_step=on_step)
    items, given = read_job(make_job())
    assert kept(done.history) == kept(train_here(items, **given).history)
    said = [each.getMessage() for each in caplog.records if "the store did not take it" in each.getMessage()]
    assert [line.partition(" ")[0] for line in said] == ["checkpoint-2", "checkpoint-3"]
    assert all("503" in line and line.endswith("the next one is tried") for line in said)
    assert CheckpointStore(s3_store, RECIPE).complete()[0].step >= 4


def sealed(work: Path, step: int, facts: dict[str, Any]) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(bytes([step]))
    seal(folder, facts)
    return folder


def test_the_newest_whole_one_is_taken_of_both_places(
    local_store: StoreConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"training": "a", "layout": "tensors", "processes": 1}
    stored = CheckpointStore(local_store, RECIPE)
    for step in (3, 4):
        stored.put(sealed(tmp_path / "there", step, facts), step)
    last = stored.complete()[0]
    stored.objects.write(f"{last.folder}/state", b"9")
    here = tmp_path / "here"
    sealed(here, 2, facts)
    assert checkpoint_to_resume(here, facts, stored) == here / "checkpoint-3"
    assert (here / "checkpoint-3" / MARKER).exists()
    assert "step 4 in the store is not used: content and digest differ" in caplog.text
    assert [each.step for each in stored.complete()] == [3]
    sealed(here, 5, facts)
    assert checkpoint_to_resume(here, facts, stored) == here / "checkpoint-5"
    assert checkpoint_to_resume(tmp_path / "nobody", facts) is None
