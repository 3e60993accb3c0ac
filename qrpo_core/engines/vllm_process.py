"""One engine of vLLM's as a process: started, asked, read from another thread, ended with all it started."""

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

from qrpo_core import die_with_parent
from qrpo_core.engines import vllm_child
from qrpo_core.errors import EngineError
from qrpo_core.followed import Follower
from qrpo_core.store.artifacts import cache_directory

# What the process sees of this one's environment. Credentials stay here, also those with a known beginning.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "CC", "CXX")
_KEPT_BEGINNINGS = ("CUDA_", "NVIDIA_", "NCCL_", "VLLM_", "HF_", "LD_", "OMP_", "KMP_", "TORCH", "TRITON_")
_CREDENTIALS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
#: Set where the environment says nothing else. Without a GPU vLLM would reserve most of the memory for keys
#: and values; 2 (GiB) is enough for what a CPU samples, and VLLM_CPU_KVCACHE_SPACE asks for more.
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}
#: Time that an engine gets to end by itself, so that it takes its shared memory along.
_END_SECONDS = 10.0
#: Time that the watcher gets to write down how the engine ended.
_EPITAPH_SECONDS = 2.0
_LAST_LINES = 8

_numbers = itertools.count()
_logger = logging.getLogger("qrpo.vllm")


def environment(gpus: Sequence[str], threads: int | None) -> dict[str, str]:
    """The environment of a process that uses these GPUs; `threads` of the CPU where there are none."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in _KEPT or name.startswith(_KEPT_BEGINNINGS))
        and not any(word in name for word in _CREDENTIALS)
    }
    variables = {**_DEFAULTS, **kept, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if not gpus:
        # The model in the process itself: vLLM's worker would bind its threads to cores that others use too.
        variables.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if threads is not None:
            variables.setdefault("OMP_NUM_THREADS", str(threads))
    return variables


class VllmProcess:
    """A process that loads a model when this is made, and is there until `close` or until it dies.

    python : interpreter of the environment with vLLM.
    settings : the first line of `vllm_child`'s protocol.
    gpus : of CUDA_VISIBLE_DEVICES; none of them: the CPU, with `threads` threads.
    log : where it writes, line by line passed on to the logger `qrpo.vllm`; removed when an engine that never
        failed is closed.
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
                    start_new_session=True,  # a group to end as a whole; Ctrl-C reaches this process alone
                )
        except OSError as error:
            raise EngineError(
                f"cannot start: {error.strerror}", where=python, remedy="see vllm.python"
            ) from None
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._messages), daemon=True)
        reader.start()
        self._follower = Follower(self.log, _logger)
        self._end = weakref.finalize(self, _end, self._process, _END_SECONDS, self._follower)
        self.send(settings)

    @property
    def pid(self) -> int:
        """Process id of the watcher, which is the process group's id as well."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still be asked something."""
        return self._end.alive and self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Hand over one line; where nobody reads it, `receive` says why."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next line, or None where there was none for `timeout` seconds.

        Raises EngineError, naming the log, when the process has failed or died; it is ended then.
        """
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is not None and "error" not in message:
            return message
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EPITAPH_SECONDS)
        raise self.failed(message["error"] if message else "the engine's process died")

    def failed(self, why: str) -> EngineError:
        """End the process at once and say why, with the last lines of its log."""
        self.kill()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " / ".join(line.strip()[:200] for line in lines[-_LAST_LINES:]) or "it printed nothing"
        return EngineError(
            f"{why}; last lines: {said}",
            where=str(self.log),
            remedy="read that log; the next try starts the engine anew and goes on with what is missing",
        )

    def kill(self) -> None:
        """End the process at once, with those that it started; the log stays."""
        if self._end.detach():
            _end(self._process, 0.0, self._follower)

    def close(self) -> None:
        """End the process and those that it started; what it wrote is of no more use."""
        if self._end.alive:
            self._end()
            self.log.unlink(missing_ok=True)


def _read(stream: Any, messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Pass on lines; None after the last. A line that is cut off comes from a process that was killed."""
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            messages.put(json.loads(line))
    messages.put(None)


def _end(process: subprocess.Popen[bytes], patience: float, follower: Follower) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    follower.close()
