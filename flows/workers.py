"""`make workers`: a worker of each work pool on this machine, in the foreground, ended together.

With several GPUs, `make workers DEVICES="0 1"` starts a worker of the pool gpu for each that is named.
A worker that is killed is started again.

Ctrl-C, SIGTERM or a closed terminal interrupts the runs in progress, which the server then shows as Crashed,
and ends the workers; what the runs committed stays. A second Ctrl-C kills the workers. If this process is
killed, its workers die with it, and their runs with them (Linux).
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

from flows.deploy import POOLS, ROOT, service_url
from flows.end_with_worker import WORKER
from flows.serve import RUN_ENVIRONMENT
from flows.server import OWN_LOGGERS
from qrpo_core.die_with_parent import die_with_parent
from qrpo_core.errors import QRPOError

#: How many runs a pool's worker takes at a time; None: any number.
LIMITS: dict[str, int | None] = {"cpu": None, "gpu": 1}

#: What a run of a worker has in its environment, unless ours says otherwise.
_ENVIRONMENT = {
    **RUN_ENVIRONMENT,
    **OWN_LOGGERS,
    "OMP_WAIT_POLICY": "PASSIVE",
    "DO_NOT_TRACK": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # default 10: each share of each stage would wait as long to begin
}
#: Seconds that runs have to record that they were interrupted.
_GRACE = 20.0
#: Seconds after which the end of a worker is an accident; one that ends sooner would end again.
_LIVED = 20.0
_BOOT = "from flows.workers import _child; _child()"


class _Stop(Exception):
    """A signal that ends the workers."""


def main(devices: Sequence[str] = ()) -> int:
    """Run the workers until a signal comes, or one of them ends at its start. Returns the exit status.

    devices : for each worker of the pool gpu its CUDA_VISIBLE_DEVICES; none: one worker, which sees them all.
    """
    environment = {**_ENVIRONMENT, **os.environ, "PREFECT_API_URL": service_url()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stop)
    wanted: dict[str, tuple[str, dict[str, str]]] = {}
    for pool in POOLS:
        for device in (devices if pool == "gpu" else ()) or (None,):
            seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
            wanted[pool if device is None else f"{pool} {device}"] = pool, environment | seen
    workers: dict[str, subprocess.Popen[bytes]] = {}
    begun: dict[str, float] = {}
    try:
        while True:
            for name, (pool, its) in wanted.items():
                if name in workers and (status := workers[name].poll()) is None:
                    continue
                if name in workers:
                    print(f"error: worker {name} ended by itself, with the status {status}", file=sys.stderr)
                    if time.monotonic() - begun[name] < _LIVED:
                        return 1
                # One that was killed does not take the others along; it is started again.
                workers[name], begun[name] = _start(name, pool, its), time.monotonic()
            time.sleep(0.5)
    except _Stop:
        return 0
    finally:
        _end(list(workers.values()))


def _start(name: str, pool: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # Under the name of the one before it, which the server would else count as online until its heartbeats
    # are missed: shares are split among as many.
    known_as = f"{socket.gethostname()}-{os.getpid()}-{name.replace(' ', '-')}"
    arguments = ["worker", "start", "--pool", pool, "--type", "process"]
    if (limit := LIMITS[pool]) is not None:
        arguments += ["--limit", str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT, str(os.getpid()), *arguments, "--name", known_as],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches us alone, and we tell each worker once
    )


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt the runs in progress, then end the workers and wait; a second signal to us kills them."""
    try:
        # A worker that is told to stop kills its runs, and the server shows them as running for ever. A run
        # that gets Ctrl-C itself records its end.
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
    """Process ids of a process's children; none where the system does not tell (only Linux does)."""
    lists = []
    with contextlib.suppress(OSError):  # a thread, or the process, that ends meanwhile
        lists = [file.read_text() for file in Path(f"/proc/{parent}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def _raise_stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stop


def _child() -> None:
    """The life of a worker's process: the `prefect` command, until it is told to stop or its parent dies."""
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
