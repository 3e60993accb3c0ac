"""Killed with SIGKILL and run again, a training gives the numbers of one that was left alone."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from qrpo_core.common.errors import StoreError
from qrpo_core.common.log_tail import new_lines
from qrpo_core.training.__main__ import main
from qrpo_core.training.checkpoints import KEPT, MARKER, damage, newest_checkpoint, seal
from qrpo_core.training.launch import HISTORY, PROGRESS, SETTINGS, exclusive_lock

#: What the clock and the machine decide.
TIMED = {"tokens_per_second", "peak_memory_gb"}
EXAMPLES = 23
STEPS = 12  # 4 examples a step, twice
LORA = {"lora_rank": 4, "lora_dropout": 0.2}

Run = Callable[..., Path]


def start(server: ForkServerContext, job: Path) -> BaseProcess:
    process = server.Process(target=main, args=([str(job)],))
    process.start()
    return process


def kill_when(process: BaseProcess, moment: Callable[[], bool], delay: float = 0) -> None:
    """SIGKILL `delay` seconds after the moment; a training that ends before it fails the test."""
    deadline = time.monotonic() + 60
    while not moment():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -9


def finish(server: ForkServerContext, job: Path) -> tuple[list[dict[str, float]], bytes]:
    """Run to the end: what was logged, without what the clock decides, and the policy's weights."""
    process = start(server, job)
    process.join(60)
    assert process.exitcode == 0
    entries = json.loads((job / HISTORY).read_text())
    kept = [{name: value for name, value in entry.items() if name not in TIMED} for entry in entries]
    assert [entry["step"] for entry in kept] == list(range(1, STEPS + 1))
    return kept, (job.parent / "policy" / "model.safetensors").read_bytes()


def steps_done(job: Path) -> int:
    """The last step that was reported, in this run or an earlier one."""
    return max((json.loads(line)[0] for line in next(new_lines(job / PROGRESS))), default=0)


def checkpoints(job: Path) -> dict[int, bool]:
    """Step → whether the marker is there."""
    found = job.glob("checkpoint-*")
    return {int(path.name.split("-")[1]): (path / MARKER).exists() for path in found}


@pytest.fixture(scope="module")
def uninterrupted(server: ForkServerContext, make_job: Run) -> tuple[list[dict[str, float]], bytes]:
    """LoRA with dropout: the masks come from the random state."""
    return finish(server, make_job(**LORA))


def test_kills_at_random_moments_change_nothing(
    server: ForkServerContext, make_job: Run, uninterrupted: tuple[list[dict[str, float]], bytes]
) -> None:
    draw = random.Random(0)
    job, done = make_job(**LORA), 0
    for _ in range(3):
        target, delay = draw.randint(done + 1, done + 3), draw.uniform(0, 0.05)
        process = start(server, job)
        kill_when(process, lambda target=target: steps_done(job) >= target, delay)
        done = steps_done(job)
        assert len(checkpoints(job)) <= KEPT + 1  # the third is the one that was being written
    assert finish(server, job) == uninterrupted


def test_a_checkpoint_that_was_being_written_is_not_used(
    server: ForkServerContext, make_job: Run, uninterrupted: tuple[list[dict[str, float]], bytes]
) -> None:
    job = make_job(**LORA)

    def writing() -> bool:
        return any(
            step > 3 and not whole and (job / f"checkpoint-{step}" / "tensors").exists()
            for step, whole in checkpoints(job).items()
        )

    kill_when(start(server, job), writing)
    half = max(checkpoints(job))
    assert checkpoints(job) == {half - 1: True, half: False}  # the older one made room
    assert finish(server, job) == uninterrupted


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    server: ForkServerContext, make_job: Run, uninterrupted: tuple[list[dict[str, float]], bytes]
) -> None:
    job = make_job(**LORA)
    kill_when(start(server, job), lambda: sum(checkpoints(job).values()) == KEPT)
    last = max(step for step, whole in checkpoints(job).items() if whole)
    path = job / f"checkpoint-{last}" / "tensors" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert finish(server, job) == uninterrupted


def test_steps_since_the_last_checkpoint_are_done_again(server: ForkServerContext, make_job: Run) -> None:
    settings = {"warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    expected = finish(server, make_job(checkpoint_minutes=30, **settings))
    job = make_job(checkpoint_minutes=0, **settings)
    kill_when(start(server, job), lambda: any(checkpoints(job).values()))
    rare = json.loads((job / SETTINGS).read_text())
    rare["training"]["checkpoint_minutes"] = 30
    (job / SETTINGS).write_text(json.dumps(rare))
    kill_when(start(server, job), lambda: steps_done(job) >= 9)
    assert max(step for step, whole in checkpoints(job).items() if whole) < 7
    assert finish(server, job) == expected


def test_a_checkpoint_counts_only_as_it_was_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    (folder / "shards").mkdir(parents=True)
    (folder / "state").write_bytes(b"12345")
    (folder / "shards" / "0").write_bytes(b"67890")
    assert damage(folder) == "it was not finished"
    seal(folder, {})
    assert damage(folder) == ""
    (folder / "shards" / "0").write_bytes(b"67891")
    assert damage(folder) == "shards/0 has another content"
    (folder / "shards" / "0").write_bytes(b"678")
    assert damage(folder) == "shards/0 has 3 bytes instead of 5"
    (folder / "shards" / "0").unlink()
    assert damage(folder) == "shards/0 is missing"
    (folder / MARKER).write_text('{"fi')
    assert damage(folder).startswith(f"{MARKER} cannot be read")


def test_what_cannot_be_used_is_deleted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = {"training": "a", "layout": "tensors", "processes": 1}
    for step in (8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state").write_bytes(b"12")
        if step < 10:
            seal(tmp_path / f"checkpoint-{step}", facts)
    (tmp_path / "checkpoint-9" / "state").write_bytes(b"1")
    assert newest_checkpoint(tmp_path, facts) == tmp_path / "checkpoint-8"
    assert list(checkpoints(tmp_path)) == [8]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("checkpoint-10 is not used: it was not finished")
    assert second.endswith("checkpoint-9 is not used: state has 1 bytes instead of 2")
    (tmp_path / "checkpoint-8" / "state").unlink()
    assert newest_checkpoint(tmp_path, facts) is None


def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    facts = {"training": "a", "layout": "tensors", "processes": 1}
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state").write_bytes(b"1")
        seal(folder, facts)
    assert newest_checkpoint(tmp_path, facts) == tmp_path / "checkpoint-10"
    assert newest_checkpoint(tmp_path, facts | {"processes": 2}) == tmp_path / "checkpoint-10"
    with pytest.raises(StoreError, match=r"of training 'a', not 'b' \[.*checkpoint-10\]: resume with"):
        newest_checkpoint(tmp_path, facts | {"training": "b"})
    with pytest.raises(StoreError, match="of layout 'tensors', not 'deepspeed'"):
        newest_checkpoint(tmp_path, facts | {"layout": "deepspeed"})


def test_two_runs_do_not_train_in_one_directory(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    refused = pytest.raises(StoreError, match="another run is training this policy")
    with exclusive_lock(lock), refused, exclusive_lock(lock, patience=0):
        pass
    with exclusive_lock(lock, patience=0):
        pass


def test_who_waits_for_a_lock_that_is_deleted_holds_the_one_after_it(tmp_path: Path) -> None:
    """A run that has committed its policy deletes its work directory while another waits for it."""
    lock = tmp_path / "work" / "lock"
    entered, go_on = threading.Event(), threading.Event()

    def second() -> None:
        with exclusive_lock(lock):
            entered.set()
            go_on.wait(60)

    waiting = threading.Thread(target=second)
    with exclusive_lock(lock):
        waiting.start()
        assert not entered.wait(0.3)
        shutil.rmtree(lock.parent)
    assert entered.wait(60)
    with pytest.raises(StoreError, match="another run"), exclusive_lock(lock, patience=0):
        pass
    go_on.set()
    waiting.join()
