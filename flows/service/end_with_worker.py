"""A pull step that ends a run when its worker dies, so that the run does not keep the GPU.

Prefect's process worker starts each run in a new session, so the run outlives a killed worker; we found no
setting of Prefect 3.8 or 3.9 against it. The run cannot ask Linux to die with its parent: pull steps run in a
thread, and the request would last only as long as that thread. So a small process waits for the end of the
worker or of the run. If the worker ends first, it ends the run. A worker that stops on a signal ends its runs
itself.

The second half of this file runs as a script with the standard library alone.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

#: Variable in a run's environment with its worker's process id.
WORKER = "QRPO_WORKER"
#: Seconds that an interrupted run gets to record its end.
_GRACE = 20.0


def end_with_worker() -> dict[str, str]:
    """Pull step: end this run when its worker ends. Linux only; elsewhere it does nothing."""
    if sys.platform == "linux":
        worker = os.environ.get(WORKER) or str(os.getppid())
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, worker, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the worker waits until every copy of the run's pipe is closed
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return {}


def _watch(worker: int, run: int) -> None:
    """Wait until either process ends. If it is the worker, end the run and its process group."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_fd = _open(run)
    if run_fd is None:
        return
    if (worker_fd := _open(worker)) is not None and run_fd in _ended([worker_fd, run_fd], None):
        return
    try:
        os.kill(run, signal.SIGINT)
        _ended([run_fd], _GRACE)
        os.killpg(run, signal.SIGKILL)  # the run leads its group: its children end too
    except ProcessLookupError:
        pass


def _open(process: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None if it has ended."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        return None


def _ended(watched: list[int], seconds: float | None) -> list[int]:
    return select.select(watched, [], [], seconds)[0]


if __name__ == "__main__":
    _watch(*map(int, sys.argv[1:]))
