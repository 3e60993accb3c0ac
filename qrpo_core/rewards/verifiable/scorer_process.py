"""Run a library's scorer in a separate process with limits on time and memory.

A completion can send a scorer into an endless computation (`9**9**9**9`), and a thread cannot be stopped. The
system ends the process at its limit; the row is reported, and the next row gets a new process. One process
serves all reward objects of a kind, from any thread, one row at a time. It ends when the last reward object
is collected or this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Literal

from qrpo_core.rewards.verifiable import scorer_main

#: The limit of a row, in words.
LIMIT = f"{scorer_main.CPU_SECONDS} s of processor time or {scorer_main.WALL_SECONDS} s in all"

# The only variables of the environment that the process gets: no credentials.
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
# sympy's results can depend on the order of sets of strings; a fixed hash seed fixes that order.
_SET_VARIABLES = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class ScorerError(Exception):
    """The scorer raised; the message is the exception's type and text."""


class WorkerTimeout(Exception):
    """The scorer used up its time on one row."""


class WorkerDied(Exception):
    """The process ended for another reason; the message says how."""


class Worker:
    """A scoring process, started at its first row.

    kind : "math" or "reasoning_gym", the library that scores.
    """

    def __init__(self, kind: Literal["math", "reasoning_gym"]) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def check(self, ground_truth: str) -> None:
        """Raise ScorerError if the scorer cannot use a ground truth."""
        self._ask({"kind": self._kind, "do": "check", "ground_truth": ground_truth})

    def score(self, ground_truth: str, answer: str) -> Any:
        """Return the score of an answer. Raises ScorerError, WorkerTimeout or WorkerDied."""
        return self._ask({"kind": self._kind, "do": "score", "ground_truth": ground_truth, "answer": answer})

    def _ask(self, request: dict[str, str]) -> Any:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:
                # An interrupt between question and answer would hand this answer to the next question.
                self._drop()
                raise
            if not line:
                raise self._epitaph()
        reply = json.loads(line)
        if "error" in reply:
            raise ScorerError(reply["error"])
        return reply["value"]

    def _running(self) -> subprocess.Popen[str]:
        # A fork of this process must not share the pipes: it starts its own.
        if self._process is None or self._owner != os.getpid():
            # Some scorers run what they score, and that writes files: not into the user's directory.
            self._scratch = tempfile.TemporaryDirectory(prefix="qrpo-score-", ignore_cleanup_errors=True)
            self._process = _start(self._scratch.name)
            self._owner = os.getpid()
            weakref.finalize(self, _end, self._process)
        return self._process

    def _drop(self) -> int:
        process, self._process = self._process, None
        return _end(process) if process else 0

    def _epitaph(self) -> Exception:
        code = self._drop()
        if code in (-signal.SIGXCPU, -signal.SIGALRM):
            return WorkerTimeout(f"the scorer took more than {LIMIT}")
        return WorkerDied(f"the scoring process ended with status {code}")


_SHARED: weakref.WeakValueDictionary[str, Worker] = weakref.WeakValueDictionary()
_KEPT: list[Worker] = []
_keeping = 0


def shared_worker(kind: Literal["math", "reasoning_gym"]) -> Worker:
    """Return the worker of this kind that other reward objects use, or a new one. A start takes seconds."""
    worker = _SHARED.get(kind)
    if worker is None:
        worker = _SHARED[kind] = Worker(kind)
    if _keeping and worker not in _KEPT:
        _KEPT.append(worker)
    return worker


@contextlib.contextmanager
def kept_workers() -> Iterator[None]:
    """Keep shared workers alive inside the block, so that the next reward need not start one."""
    global _keeping
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            _KEPT.clear()


def _start(folder: str) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        # -P: the script's own folder must not shadow modules of the standard library.
        [sys.executable, "-P", "-W", "ignore", scorer_main.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="ascii",
        cwd=folder,
        env=kept | _SET_VARIABLES,
    )


def _end(process: subprocess.Popen[str]) -> int:
    """End the process if it runs, close its pipes and return its exit status."""
    if process.stdin and not process.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if process.stdout:
        process.stdout.close()
    return code
