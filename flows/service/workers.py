"""`make workers`: one Prefect worker for each work pool on this machine, in the foreground.

With several GPUs, `make workers DEVICES="0 1"` starts a worker of the pool gpu for each named device.
A worker that is killed is started again.

Ctrl-C, SIGTERM or a closed terminal interrupts the runs in progress, which the server then shows as Crashed,
and ends the workers; committed results stay. A second Ctrl-C kills the workers. If this process is killed,
its workers and their runs die with it (Linux). `prefect worker start` does none of this: it serves one pool,
and on SIGTERM it kills its runs, which the server then shows as Running for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flows.service.deploy import POOLS, ROOT, service_url
from flows.service.end_with_worker import WORKER
from flows.service.serve import RUN_ENVIRONMENT
from flows.service.server import LOGGING_ENVIRONMENT
from qrpo_core.common.die_with_parent import die_with_parent
from qrpo_core.common.errors import QRPOError

#: Runs that a worker of each pool takes at a time; None: any number.
LIMITS: dict[str, int | None] = {"cpu": None, "gpu": 1}

#: Settings of a worker's runs; the environment overrides them.
_ENVIRONMENT = {
    **RUN_ENVIRONMENT,
    **LOGGING_ENVIRONMENT,
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # default 10: each shard of each stage would start that much later
}
#: Seconds that interrupted runs get to record their end.
_GRACE = 20.0
#: A worker that ends sooner than this is not started again: it would end again.
_MIN_LIFETIME = 20.0
_BOOT = "from flows.service.workers import _child; _child()"


class _Stop(Exception):
    """Raised by a signal that ends the workers."""


def main(devices: Sequence[str] = ()) -> int:
    """Run the workers until a signal comes or one ends within `_MIN_LIFETIME`; returns the exit status.

    devices : CUDA_VISIBLE_DEVICES of each worker of the pool gpu; empty: one worker, which sees all devices.
    """
    environment = {**_ENVIRONMENT, **os.environ, "PREFECT_API_URL": service_url()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stop)
    wanted: dict[str, tuple[str, dict[str, str]]] = {}
    for pool in POOLS:
        for device in (devices if pool == "gpu" else ()) or (None,):
            visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
            wanted[pool if device is None else f"{pool} {device}"] = pool, environment | visible
    workers: dict[str, subprocess.Popen[bytes]] = {}
    started_at: dict[str, float] = {}
    try:
        while True:
            for name, (pool, variables) in wanted.items():
                if name in workers and (status := workers[name].poll()) is None:
                    continue
                if name in workers:
                    print(f"error: worker {name} ended by itself with status {status}", file=sys.stderr)
                    if time.monotonic() - started_at[name] < _MIN_LIFETIME:
                        return 1
                workers[name], started_at[name] = _start(name, pool, variables), time.monotonic()
            time.sleep(0.5)
    except _Stop:
        return 0
    finally:
        _end(list(workers.values()))


def _start(name: str, pool: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A restarted worker keeps its name. Under a new one the server would count both as online until it
    # misses the old one's heartbeats, and rows would be split among too many.
    known_as = f"{socket.gethostname()}-{os.getpid()}-{name.replace(' ', '-')}"
    arguments = ["worker", "start", "--pool", pool, "--type", "process"]
    if (limit := LIMITS[pool]) is not None:
        arguments += ["--limit", str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(os.getpid()), *arguments, "--name", known_as],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches only this process, which signals each worker once
    )


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt the runs in progress, then end the workers; a second signal kills the workers."""
    try:
        # An interrupted run records its end. A stopped worker kills its runs, which then stay Running.
        for run in (runs := [run for worker in workers for run in _children(worker.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(run, signal.SIGINT)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(
            run in _children(worker.pid) for worker in workers for run in runs
        ):
            time.sleep(0.1)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    except _Stop:
        for worker in workers:
            worker.kill()
    for worker in workers:
        worker.wait()


def _children(parent: int) -> list[int]:
    """Process ids of a process's children; [] where the system has no /proc."""
    lists = []
    with contextlib.suppress(OSError):  # the process or a thread of it has ended
        lists = [file.read_text() for file in Path(f"/proc/{parent}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def _raise_stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stop


def _child() -> None:
    """Body of a worker's process: the `prefect` command, until a signal or the death of the parent."""
    parent, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    os.environ[WORKER] = str(os.getpid())
    sys.argv[:] = ["prefect", *arguments]
    from prefect.cli import app

    app()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except QRPOError as error:
        sys.exit(f"error: {error}")
