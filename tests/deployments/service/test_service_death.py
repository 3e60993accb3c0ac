"""What ends a run from outside: its worker killed, its machine gone, its server restarted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.service.automations import CRASHED_AFTER
from flows.service.serve import RUN_ENVIRONMENT
from qrpo_core.config.reading import load_experiment

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the processes of a run"),
]
SLOW = {"kind": "python", "python": {"function": "tested_reward:score", "batch_size": 4}}


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Any]) -> Any:
    """A service whose runs are dead after 60 s without a heartbeat (they send one every 30 s)."""
    service = make_service(**{CRASHED_AFTER: "60", **RUN_ENVIRONMENT})
    service.serve()
    printed = service.run("flows.service.deploy")
    assert "Automation 'qrpo: no heartbeat': Crashed after 60 s without one." in printed
    return service


@pytest.fixture
def slow_run(service: Any, write_experiment: Callable[..., Path]) -> Callable[..., str]:
    """Starts a run that takes at least `seconds`, most of them in its reward."""

    def begin(name: str, seconds: float) -> str:
        experiment = load_experiment(write_experiment(name, reward=SLOW))
        batches = 15 * 4 / SLOW["python"]["batch_size"]
        (service.folder / "seconds").write_text(str(seconds / batches))
        return str(service.begin("precompute", experiment.model_dump(mode="json")))

    return begin


def processes(service: Any) -> dict[int, str]:
    """The processes of the service's runs, and what watches them, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            run = any(word.startswith(b"PREFECT__FLOW_RUN_ID=") for word in words)
            if run and f"PREFECT_API_URL={service.url}".encode() in words:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
    return found


def unfinished(service: Any) -> list[tuple[str, str]]:
    """Runs that have begun and not ended; a shard that waits for a worker is not one."""
    states = [(run["name"], run["state"]["type"]) for run in service.ask("POST", "/flow_runs/filter")]
    ended = ("COMPLETED", "CRASHED", "CANCELLED")  # a shard is cancelled if its run's end is told in time
    return [(name, state) for name, state in states if state not in (*ended, "SCHEDULED")]


def wait_until(true: Callable[[], bool], seconds: float, what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


def test_a_run_ends_with_its_killed_worker(service: Any, slow_run: Callable[..., str]) -> None:
    workers = service.start("flows.service.workers")
    run = slow_run("orphan", 300)
    service.said(run, "sample references +[0-9]+ rows computed")
    assert len(processes(service)) >= 2, processes(service)  # it and its watch
    os.kill(workers.pid, signal.SIGKILL)  # the workers die with it
    workers.wait()
    wait_until(lambda: not processes(service), 120, lambda: processes(service))
    # It says so itself, or if it waited for a shard and did not hear, the automation does.
    assert service.end(run, 600)[0] == "CRASHED"
    wait_until(lambda: not unfinished(service), 300, lambda: unfinished(service))


def test_a_run_whose_machine_is_gone_is_crashed_and_its_slot_is_free(
    service: Any, slow_run: Callable[..., str]
) -> None:
    service.ask("PATCH", "/work_pools/gpu", concurrency_limit=1)
    workers = service.start("flows.service.workers")
    run = slow_run("gone", 60)
    service.said(run, "sample references +[0-9]+ rows computed")
    for process in (workers.pid, *processes(service)):  # nothing is left that could tell anybody
        os.kill(process, signal.SIGKILL)
    workers.wait()
    killed = time.monotonic()
    assert service.state(run)[0] == "RUNNING"
    state, message = service.end(run, 600)
    print(f"Crashed {time.monotonic() - killed:.0f} s after SIGKILL")
    assert (state, message) == (
        "CRASHED",
        "No heartbeat for 60 s: the process is gone. Committed results stay; run it again.",
    )
    # Also the runs inside it and its shards; and one after it gets the place that it had in its pool.
    wait_until(lambda: not unfinished(service), 300, lambda: unfinished(service))
    workers = service.start("flows.service.workers")
    assert service.end(slow_run("next", 0))[0] == "COMPLETED"
    workers.terminate()
    workers.wait()


def test_a_run_completes_though_its_server_is_restarted(service: Any, slow_run: Callable[..., str]) -> None:
    workers = service.start("flows.service.workers")
    run = slow_run("restart", 30)
    service.said(run, "sample references +[0-9]+ rows computed")
    service.server.kill()
    service.server.wait()
    time.sleep(10)
    service.serve()
    assert service.end(run) == ("COMPLETED", "")

    # The server gets all of the record, what was written while it was away included.
    def unrecorded() -> list[Any]:
        tasks = service.ask("POST", "/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return [(t["name"], t["state"]["type"]) for t in tasks if t["state"]["type"] != "COMPLETED"]

    wait_until(lambda: not unrecorded(), 300, unrecorded)
    assert workers.poll() is None
