"""Progress of a stage: a bar with rate and remaining time in the terminal, an artifact in the UI.

The command line puts its console here; on a worker there is none and progress goes to the run's log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Seconds between updates of the UI's artifact (one HTTP call each), and between lines without a terminal.
ARTIFACT_SECONDS = 2.0
LINE_SECONDS = 15.0

_console: Console | None = None


def use_console(console: Console) -> None:
    """Show progress on this console; called once by the command line."""
    global _console
    _console = console


class _Rate(ProgressColumn):
    """Rows a second since the start of the stage."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed:,.1f}/s" if task.elapsed and task.completed else "–/s")


class _Reporter:
    """Counts rows and tells the terminal or the log, and the UI, no oftener than is useful."""

    def __init__(self, label: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self.label, self.total, self.unit, self.say = label, total, unit, say
        self.done = 0
        self.started = self.artifact_at = self.line_at = time.monotonic()
        self.lock = threading.Lock()
        self.artifact = create_progress_artifact(0.0, description=self._text())

    def advance(self, rows: int) -> None:
        with self.lock:
            self.done += rows
            now = time.monotonic()
            if now - self.artifact_at >= ARTIFACT_SECONDS:
                self.artifact_at = now
                self._update()
            if now - self.line_at >= LINE_SECONDS:
                self.line_at = now
                self.say(self._text())

    def close(self) -> None:
        self._update()

    def _update(self) -> None:
        update_progress_artifact(
            self.artifact, 100 * self.done / max(self.total, 1), description=self._text()
        )

    def _text(self) -> str:
        seconds = time.monotonic() - self.started
        text = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}"
        if self.done and seconds > 0:
            rate = self.done / seconds
            text += f", {rate:,.1f}/s, {(self.total - self.done) / rate:,.0f} s left"
        return text


def announce(stage: str, reused: int, computed: int, unit: str, seconds: float) -> None:
    """One line for a finished stage."""
    done = f"{computed:,} {unit} computed" if computed else f"cached, {reused:,} {unit} reused"
    if computed and reused:
        done += f", {reused:,} reused"
    _line(f"  {stage:<28} {done} ({seconds:.1f} s)")


def announce_fact(text: str) -> None:
    """One line about what was measured."""
    _line(f"  {text}")


def announce_problem(text: str) -> None:
    """One line for something that was met and is being mended."""
    if _console is not None:
        _console.print(f"  {text}", highlight=False, style="yellow")
    else:
        get_run_logger().warning(text)


@contextmanager
def stage_progress(label: str, total: int, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Must be entered inside a flow or task run (the artifact belongs to it)."""
    bar = _bar(unit) if _console is not None and _console.is_terminal else None
    reporter = _Reporter(label, total, unit, _line if bar is None else lambda text: None)
    try:
        if bar is None:
            yield reporter.advance
            return
        with bar:
            task = bar.add_task(label, total=total)

            def advance(rows: int) -> None:
                bar.advance(task, rows)
                reporter.advance(rows)

            yield advance
    finally:
        reporter.close()


def _bar(unit: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate()]
    return Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=_console, transient=True)


def _line(text: str) -> None:
    if _console is not None:
        _console.print(text, highlight=False)
    else:
        get_run_logger().info(text)
