"""One vLLM child process: start it, exchange messages, end it together with its own children."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from qrpo_core.common import die_with_parent
from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import EngineError
from qrpo_core.common.log_tail import LogTail
from qrpo_core.engines import vllm_child

# Environment variables that the child inherits. Variables that look like credentials are never inherited.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "CC", "CXX")
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "VLLM_", "HF_", "LD_", "OMP_", "KMP_", "TORCH", "TRITON_")
_CREDENTIALS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
#: Defaults that the environment overrides. Without a GPU vLLM would reserve most of the memory for keys and
#: values; 2 GiB is enough for the batches of a CPU.
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}
#: Time for the child to end by itself, so that it removes its shared memory.
_END_SECONDS = 10.0
#: Time for the watcher to log how the server ended.
_LAST_WORDS_SECONDS = 2.0
_LAST_LINES = 8

_numbers = itertools.count()
_logger = logging.getLogger("qrpo.vllm")


def environment(gpus: Sequence[str], threads: int | None) -> dict[str, str]:
    """The environment of a child that uses these GPUs, or `threads` CPU threads if there are none."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in _KEPT or name.startswith(_KEPT_PREFIXES))
        and not any(word in name for word in _CREDENTIALS)
    }
    variables = {**_DEFAULTS, **kept, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if not gpus:
        # Run the model in this process: a worker of vLLM would bind its threads to cores that are in use.
        variables.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if threads is not None:
            variables.setdefault("OMP_NUM_THREADS", str(threads))
    return variables


class VllmProcess:
    """A child process that loads a model at once and runs until `close`, or until it fails.

    python : interpreter of the environment with vLLM.
    settings : first line of `vllm_child`'s protocol.
    gpus : for CUDA_VISIBLE_DEVICES; empty for the CPU with `threads` threads.
    log : file with its output, which also goes to the logger `qrpo.vllm`; `close` removes it unless the child
        failed.
    """

    def __init__(
        self, python: str, settings: dict[str, Any], *, gpus: Sequence[str] = (), threads: int | None = None
    ) -> None:
        folder = cache_directory() / "vllm"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_numbers)}.log"
        command = [python, "-I", vllm_child.__file__, "watch", str(os.getpid()), die_with_parent.__file__]
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environment(gpus, threads),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # its own group, which Ctrl-C does not reach
                )
        except OSError as error:
            raise EngineError(
                f"cannot start: {error.strerror}", where=python, remedy="see vllm.python"
            ) from None
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._messages), daemon=True)
        reader.start()
        self._follower = LogTail(self.log, _logger)
        self._end = weakref.finalize(self, _end, self._process, _END_SECONDS, self._follower)
        self.send(settings)

    @property
    def pid(self) -> int:
        """Process id of the watcher, which is also the process group's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._end.alive and self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Write one line. If the child has ended, `receive` raises the reason."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None if none came within `timeout` seconds.

        Raises EngineError, naming the log, if the child failed or died; its process group is killed then.
        """
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is not None and "error" not in message:
            return message
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        raise self.failed(message["error"] if message else "the engine's process died")

    def failed(self, why: str) -> EngineError:
        """Kill the process group. Returns the error to raise, with the last lines of the log."""
        self.kill()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " / ".join(line.strip()[:200] for line in lines[-_LAST_LINES:]) or "it printed nothing"
        return EngineError(
            f"{why}; last lines: {said}",
            where=str(self.log),
            remedy="read that log; the next run restarts the engine and computes the missing rows",
        )

    def kill(self) -> None:
        """Kill the process group; the log stays."""
        if self._end.detach():
            _end(self._process, 0.0, self._follower)

    def close(self) -> None:
        """End the process group and remove the log."""
        if self._end.alive:
            self._end()
            self.log.unlink(missing_ok=True)


def _read(stream: Any, messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Queue the messages of a stream, then None. The last line may be incomplete if the child was killed."""
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            messages.put(json.loads(line))
    messages.put(None)


def _end(process: subprocess.Popen[bytes], patience: float, follower: LogTail) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    follower.close()
