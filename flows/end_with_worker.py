"""A pull step for deployments: a run ends when its worker is gone, and does not keep its GPU.

Prefect's process worker starts a run in a session of its own, where it outlives a worker that is killed. The
run cannot ask the system for its death with its parent: pull steps run in a thread, and the process then
becomes the engine, which keeps what its first thread has asked for. So a small process waits for the worker's
end or the run's, whichever comes first, and ends the run if it is the worker's. A worker that is told to stop
ends its runs itself.

The second half runs as a script, with the standard library alone.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

#: Process id of the worker, in the environment of its runs.
WORKER = "QRPO_WORKER"
#: Seconds that a run has to record that it was interrupted, as with Ctrl-C.
_GRACE = 20.0


def end_with_worker() -> dict[str, str]:
    """Pull step: from now on this run ends when its worker does. Linux; elsewhere it does nothing."""
    if sys.platform == "linux":
        worker = os.environ.get(WORKER) or str(os.getppid())
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, worker, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the run's own ends when the run does, and the worker waits for that
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return {}


def _watch(worker: int, run: int) -> None:
    """Wait for the end of either; end the run, and what is left of its process group, if it is the worker."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lives = _open(run)
    if lives is None:
        return
    if (boss := _open(worker)) is not None and lives in _ended([boss, lives], None):
        return
    try:
        os.kill(run, signal.SIGINT)
        _ended([lives], _GRACE)
        os.killpg(run, signal.SIGKILL)  # it leads its group; what it left there ends, too
    except ProcessLookupError:
        pass


def _open(process: int) -> int | None:
    """A file descriptor that becomes readable at the process's end; None if it is gone already."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        return None


def _ended(watched: list[int], seconds: float | None) -> list[int]:
    return select.select(watched, [], [], seconds)[0]


if __name__ == "__main__":
    _watch(*map(int, sys.argv[1:]))
