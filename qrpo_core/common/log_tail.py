"""The tail of a log file that another process writes."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 0.5


def new_lines(path: Path) -> Iterator[list[str]]:
    """An endless iterator: each step gives the complete lines that were appended since the step before."""
    while not path.exists():
        yield []
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while True:
            *whole, rest = (rest + file.read()).split("\n")
            yield whole


class LogTail:
    """Logs new lines of a file until it is closed.

    The lines are logged in the context (a task run, say) of the thread that creates this object.
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        self._path, self._logger = path, logger
        self._ended = threading.Event()
        here = contextvars.copy_context()
        self._thread = threading.Thread(target=here.run, args=(self._follow,), name="log tail", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Log the remaining lines, and end."""
        self._ended.set()
        self._thread.join(10 * _SECONDS)

    def _follow(self) -> None:
        lines = new_lines(self._path)
        while True:
            last = self._ended.wait(_SECONDS)
            for line in next(lines):
                self._logger.info("%s", line)
            if last:
                return
