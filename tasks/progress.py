"""Progress of a stage: a bar with rate and remaining time in the terminal, an artifact in the UI.

The command line puts its console here; on a worker there is none and progress goes to the run's log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

from qrpo_core.show import duration
from tasks.cost import Meter, experiment_of_run, meter

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

    def __init__(
        self, label: str, total: int, unit: str, say: Callable[[str], None], meter: Meter | None
    ) -> None:
        self.label, self.total, self.unit, self.say, self.meter = label, total, unit, say, meter
        self.done = 0
        self.started = self.artifact_at = self.line_at = time.monotonic()
        self.lock = threading.Lock()
        self.artifact = shown(lambda: create_progress_artifact(0.0, description=self._text()))

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
        artifact, percent = self.artifact, 100 * self.done / max(self.total, 1)
        if artifact is not None:
            shown(lambda: update_progress_artifact(artifact, percent, description=self._text()))

    def _text(self) -> str:
        seconds = time.monotonic() - self.started
        return progress_text(self.label, self.done, self.total, self.unit, seconds, self.meter)


def progress_text(label: str, done: int, total: int, unit: str, seconds: float, meter: Meter | None) -> str:
    """How far a stage is after so many seconds, as long as it goes on at the same rate.

    sample references: 120 of 300 rows, 2.5 rows/s, 1 min 12 s left, 3.20 so far of about 8.00
    """
    text = f"{label}: {done:,} of {total:,} {unit}"
    costs = meter is not None and meter.gpus > 0
    if done and seconds > 0:
        rate = done / seconds
        text += f", {rate:,.1f} {unit}/s" if rate >= 1 else f", {rate:.2g} {unit}/s"
        text += f", {duration((total - done) / rate)} left" if done < total else f" in {duration(seconds)}"
    if meter is not None and costs and seconds > 0:
        text += f", {meter.text(meter.cost(seconds))}"
        if 0 < done < total:
            text += f" so far of about {meter.text(meter.cost(seconds * total / done))}"
    return text


def shown(publish: Callable[[], Any]) -> Any:
    """What `publish` returns; None, and a warning, where it fails: what the UI shows never fails a run."""
    try:
        return publish()
    except Exception as error:  # the server's, the network's, or that of whoever wrote the artifact
        announce_problem(f"the UI does not show everything: {type(error).__name__}: {error}")
        return None


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
def stage_progress(
    label: str, total: int, unit: str = "rows", *, machines: int = 1
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Must be entered inside a flow or task run (the artifact belongs to it).

    machines : that work on the stage at once, for its cost.
    """
    bar = _bar(unit) if _console is not None and _console.is_terminal else None
    costs = shown(lambda: meter(experiment_of_run(), label, machines))
    reporter = _Reporter(label, total, unit, _line if bar is None else lambda text: None, costs)
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
