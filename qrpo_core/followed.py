"""Files that another process writes, line by line as they grow."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 0.5


def appended(path: Path) -> Iterator[list[str]]:
    """Each time it is asked: the whole lines that were appended to a file since the last time."""
    while not path.exists():
        yield []
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while True:
            *whole, rest = (rest + file.read()).split("\n")
            yield whole


class Follower:
    """Passes the lines of a file on to a logger as they come, until it is closed.

    They belong to whatever the thread that makes this belongs to (a task run, say).
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        self._path, self._logger = path, logger
        self._ended = threading.Event()
        here = contextvars.copy_context()
        self._thread = threading.Thread(target=here.run, args=(self._follow,), name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what is there, and end."""
        self._ended.set()
        self._thread.join(10 * _SECONDS)

    def _follow(self) -> None:
        lines = appended(self._path)
        while True:
            last = self._ended.wait(_SECONDS)
            for line in next(lines):
                self._logger.info("%s", line)
            if last:
                return
