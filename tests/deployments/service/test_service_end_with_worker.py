"""The pull step after which a run ends with its worker, with processes that stand for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service.deploy import ROOT
from flows.service.end_with_worker import WORKER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the step does nothing elsewhere")

# A worker starts a run in a session of its own and says both ids; the run starts a child in its group.
WORK = """
import os, subprocess, sys, time
run = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(os.getpid(), run.pid, flush=True)
run.wait()
time.sleep(60)
"""
RUN = """
import os, signal, subprocess, sys, time
from flows.service import end_with_worker
{before}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
assert end_with_worker.end_with_worker() == {{}}
print("on", child.pid, flush=True)
time.sleep({seconds})
child.kill()
"""


def state(process: int) -> str:
    """Its letter in /proc; "" if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def watch_of(run: int) -> int:
    """The process that watches a run."""
    deadline = time.monotonic() + 60
    while len(found := watching(run)) != 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found[0]


def watching(run: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-S" in words and any(word.endswith(b"end_with_worker.py") for word in words):
            found += [int(folder.name)] if str(run).encode() in words else []
    return found


def gone(processes: list[int], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(state(process) in ("", "Z") for process in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def begin() -> Iterator[Callable[..., tuple[int, int, int]]]:
    """Starts a worker with a run; ids of the worker, the run, and the child of the run."""
    started: list[tuple[subprocess.Popen[str], list[int]]] = []

    def start(before: str = "", seconds: float = 600, **environment: str) -> tuple[int, int, int]:
        run = RUN.format(before=before, seconds=seconds)
        worker = subprocess.Popen(
            [sys.executable, "-c", WORK, run],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        ids = [int(word) for word in worker.stdout.readline().split()]
        ids.append(int(worker.stdout.readline().split()[1]))
        started.append((worker, ids))
        return ids[0], ids[1], ids[2]

    yield start
    for worker, ids in started:
        for process in ids[1:]:
            if state(process) not in ("", "Z"):
                os.kill(process, signal.SIGKILL)
        worker.kill()
        worker.communicate()


def test_a_run_ends_with_its_worker(begin: Callable[..., Any]) -> None:
    worker, run, child = begin()
    watch = watch_of(run)
    time.sleep(0.5)
    assert state(run) == "S"  # not before
    os.kill(worker, signal.SIGKILL)
    assert gone([run, child, watch])


def test_a_run_that_does_not_hear_is_killed_with_its_group(begin: Callable[..., Any], tmp_path: Path) -> None:
    shipped = (ROOT / "flows/service/end_with_worker.py").read_text()
    quick = tmp_path / "end_with_worker.py"
    quick.write_text(shipped.replace("_GRACE = 20.0", "_GRACE = 0.5"))
    assert quick.read_text() != shipped
    before = f"signal.signal(signal.SIGINT, signal.SIG_IGN)\nend_with_worker.__file__ = {str(quick)!r}"
    worker, run, child = begin(before)
    os.kill(worker, signal.SIGKILL)
    assert gone([run, child])


def test_the_watch_ends_with_the_run(begin: Callable[..., Any]) -> None:
    worker, run, _ = begin(seconds=3)
    watch = watch_of(run)
    assert gone([run, watch])
    assert state(worker) == "S"


def test_a_worker_that_died_before_the_step_counts(begin: Callable[..., Any]) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _, run, child = begin(**{WORKER: str(dead.pid)})
    assert gone([run, child])
