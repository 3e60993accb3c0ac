"""Files that another process writes, followed line by line."""

from __future__ import annotations

import contextvars
import logging
import threading
from pathlib import Path

import pytest

from qrpo_core.common.log_tail import LogTail, new_lines

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


def test_whole_lines_come_once_and_a_broken_character_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = new_lines(path)
    assert next(lines) == []  # it is not there yet
    path.write_bytes(b"one\ntw")
    assert next(lines) == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n\xff\r\n")
    assert next(lines) == ["two", "\ufffd\r"]
    assert next(lines) == []


def test_a_follower_passes_on_every_line_in_the_context_that_made_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, seen = tmp_path / "log", []
    logger = logging.getLogger("qrpo.tested")
    logger.addFilter(lambda record: seen.append((record.getMessage(), WHO.get())) or True)
    WHO.set("a run")
    before = threading.active_count()
    with caplog.at_level(logging.INFO, "qrpo.tested"):
        follower = LogTail(path, logger)
        with path.open("w") as file:
            for number in range(1000):
                print("line", number, "100 %s", file=file, flush=number % 7 == 0)
        follower.close()
    assert seen == [(f"line {number} 100 %s", "a run") for number in range(1000)]
    assert threading.active_count() == before
