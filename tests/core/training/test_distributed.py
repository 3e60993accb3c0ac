"""Two processes give what one gives: whole copies (DDP) and shards (FSDP2), on gloo; and torchrun's life."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrpo_core.training.__main__ import main
from qrpo_core.training.checkpoints import MARKER
from qrpo_core.training.launch import COMPARISON, HISTORY, launch, read_job
from qrpo_core.training.survival import LogprobComparison
from tests.rounding import reordered, reordered_weights

TIMED = {"tokens_per_second", "peak_memory_gb"}
#: How a step is cut into passes depends on the processes, and with it what is padded.
CUT = {"shared_prefix_share"}
#: 4 a step, twice: the last step of an epoch has 3, of which one process gets one.
EXAMPLES = 11
STEPS = 6

#: Operations from a weight to the gradient norm: the sums over 64 and 128 features in two layers, there and
#: back, over 262 tokens of the vocabulary, over the tokens of a batch, and over the weights of a layer.
ROUNDINGS = 4_000
#: A squared difference of a log-prob, some -50, from its target: a relative error of the log-prob grows twice
#: by the square, and twice by the difference.
CONDITION = 4.0
GRADIENT = reordered(ROUNDINGS, condition=CONDITION)
#: Under bfloat16 autocast sums are float32, and what goes from one of 20 operations to the next is rounded.
GRADIENT_BF16 = reordered(20, dtype="bfloat16")

Entries = list[dict[str, float]]
Finished = tuple[Entries, dict[str, Any]]


def start(server: ForkServerContext, job: Path, processes: int) -> list[BaseProcess]:
    """What torchrun starts, from the fork server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [
        server.Process(target=runpy.run_path, args=(__file__, {"JOB": str(job), "RANK": rank}, "rank"))
        for rank in ranks
    ]
    for process in started:
        process.start()
    return started


def finish(server: ForkServerContext, job: Path, processes: int) -> Finished:
    """Run to the end: what was logged, without what the clock decides, and the policy's weights."""
    from safetensors.numpy import load_file

    started = start(server, job, processes)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * processes
    saved = LogprobComparison.from_json((job / COMPARISON).read_bytes()).survival
    assert saved.rows == EXAMPLES
    assert saved.share == pytest.approx(1, abs=1e-3)
    assert saved.trained > 0.1
    assert saved.largest_difference < 1e-3
    return kept(json.loads((job / HISTORY).read_text())), load_file(
        job.parent / "policy" / "model.safetensors"
    )


def kept(entries: Entries) -> Entries:
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [{name: value for name, value in entry.items() if name not in TIMED} for entry in entries]


def sealed(job: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in job.glob(f"checkpoint-*/{MARKER}"))


def assert_close(entries: Entries, expected: Entries, gradient: float = GRADIENT) -> None:
    """Each step adds its own difference to the weights, and so to everything that is logged after it."""
    for step, (entry, one) in enumerate(zip(entries, expected, strict=True), 1):
        close(entry, one, step * gradient)


def close(entry: dict[str, float], one: dict[str, float], tolerance: float) -> None:
    same = entry.keys() - CUT
    assert same == one.keys() - CUT
    for name in same:
        assert entry[name] == pytest.approx(one[name], rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def uninterrupted(server: ForkServerContext, make_job: Callable[..., Path]) -> Callable[..., Finished]:
    """The result of a training that nobody disturbs; each is run once."""

    @cache
    def run(processes: int, **training: Any) -> Finished:
        return finish(server, make_job(**training), processes)

    return run


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(
    uninterrupted: Callable[..., Finished], tiny_model: Path, parallel: str
) -> None:
    from safetensors.numpy import load_file

    (expected, one), (history, two) = uninterrupted(1), uninterrupted(2, parallel=parallel)
    assert_close(history, expected)
    assert two.keys() == one.keys()
    start = load_file(tiny_model / "model.safetensors")
    moved = sum(float(((one[name] - start[name]) ** 2).sum()) for name in one)
    apart = sum(float(((one[name] - two[name]) ** 2).sum()) for name in one)
    assert moved > 0
    assert (apart / moved) ** 0.5 < reordered_weights(STEPS * GRADIENT)


def test_two_processes_give_the_first_numbers_of_one_in_bfloat16(
    uninterrupted: Callable[..., Finished],
) -> None:
    """Where the processor has no bfloat16 this is float32. Later steps amplify the rounding of the first."""
    (expected, _), (history, _) = (uninterrupted(number, precision="bf16") for number in (1, 2))
    close(history[0], expected[0], GRADIENT_BF16)


def kill_all(server: ForkServerContext, job: Path, processes: int = 2) -> int:
    """Processes train until they have sealed one more checkpoint, and are killed. Returns its step."""
    before = max(sealed(job), default=0)
    started = start(server, job, processes)
    while max(sealed(job), default=0) == before:
        assert all(process.is_alive() for process in started)
        time.sleep(0.001)
    for process in started:
        process.kill()
        process.join()
    assert not (job / HISTORY).exists()
    return max(sealed(job))


@pytest.mark.parametrize(
    "training",
    [
        {"parallel": "ddp"},
        {"parallel": "fsdp"},
        pytest.param({"parallel": "fsdp", "lora_rank": 4, "lora_dropout": 0.2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_kill_of_both_changes_nothing(
    server: ForkServerContext,
    make_job: Callable[..., Path],
    uninterrupted: Callable[..., Finished],
    training: dict[str, Any],
) -> None:
    expected, weights = uninterrupted(2, **training)
    job = make_job(**training)
    folder = job / f"checkpoint-{kill_all(server, job)}"
    assert list(folder.glob("tensors/__1_*.distcp"))  # the second process has written a part
    history, again = finish(server, job, 2)
    assert history == expected
    assert all(np.array_equal(tensor, weights[name]) for name, tensor in again.items())


@pytest.mark.parametrize(
    "training",
    [
        {"parallel": "ddp"},
        {"parallel": "fsdp"},
        pytest.param({"parallel": "fsdp", "lora_rank": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_another_number_of_processes_goes_on(
    server: ForkServerContext,
    make_job: Callable[..., Path],
    uninterrupted: Callable[..., Finished],
    training: dict[str, Any],
) -> None:
    """Two, then one, then several again."""
    whole = {name: value for name, value in training.items() if name != "parallel"}
    job = make_job(**training)
    first = kill_all(server, job)
    assert kill_all(server, job, processes=1) > first
    last = 3 if "lora_rank" in training else 2  # of three, one has no row of an adapter of rank 4
    history, _ = finish(server, job, last)
    assert_close(history, uninterrupted(1, **whole)[0])


LAUNCH = """
import sys
from pathlib import Path
from qrpo_core.training.launch import launch, read_job
items, given = read_job(Path(sys.argv[1]))
launch(items, **given)
"""


def alive(job: Path) -> list[int]:
    """Processes that have this job on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(job).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.long
def test_what_ends_the_launcher_ends_what_it_started(
    make_job: Callable[..., Path], end: signal.Signals
) -> None:
    job = make_job(processes=2)
    parent = subprocess.Popen([sys.executable, "-c", LAUNCH, str(job)], stderr=subprocess.DEVNULL)
    while len(alive(job)) < 4:  # it, torchrun, and two that train
        assert parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(end)
    assert parent.wait(20) == -end
    deadline = time.monotonic() + 10
    while (left := alive(job)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(
    make_job: Callable[..., Path], uninterrupted: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    items, given = read_job(make_job(processes=2))
    seen: list[tuple[int, int, float]] = []
    done = launch(items, **given, on_step=lambda *step: seen.append((*step[:2], step[2]["loss"])))
    history = done.history
    assert done.comparison is not None
    assert done.comparison.survival.share == pytest.approx(1, abs=1e-3)
    assert_close(kept(history), uninterrupted(1)[0])
    assert seen == [(step, STEPS, entry["loss"]) for step, entry in enumerate(history, start=1)]


if __name__ == "rank":  # one of two, see `start`
    os.environ.update(RANK)  # type: ignore[name-defined]  # noqa: F821
    sys.exit(main([JOB]))  # type: ignore[name-defined]  # noqa: F821
