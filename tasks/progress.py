"""Progress of a stage: a bar with rate and remaining time in the terminal, an artifact in the UI.

The command line sets the console; a worker has none. Lines also go to the run's log and to that of the
outermost run, such as `align`, which is the one that people open; so do the warnings of the core.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any

from prefect import get_run_logger, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging.handlers import APILogHandler
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

from qrpo_core.common.formatting import duration
from tasks.cost import Meter, experiment_of_run, meter
from tasks.spending import spending

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
    """Counts rows and updates the terminal or log and the UI at the intervals above."""

    def __init__(
        self, label: str, total: int, unit: str, write_line: Callable[[str], None], meter: Meter | None
    ) -> None:
        self.label, self.total, self.unit, self.write_line, self.meter = label, total, unit, write_line, meter
        self.done = 0
        self.started = self.artifact_at = self.line_at = time.monotonic()
        self.lock = threading.Lock()
        self.artifact = publish_safely(lambda: create_progress_artifact(0.0, description=self._text()))

    def advance(self, rows: int) -> None:
        with self.lock:
            self.done += rows
            now = time.monotonic()
            if now - self.artifact_at >= ARTIFACT_SECONDS:
                self.artifact_at = now
                self._update()
            if now - self.line_at >= LINE_SECONDS:
                self.line_at = now
                self.write_line(self._text())

    def close(self) -> None:
        self._update()

    def _update(self) -> None:
        artifact, percent = self.artifact, 100 * self.done / max(self.total, 1)
        if artifact is not None:
            publish_safely(lambda: update_progress_artifact(artifact, percent, description=self._text()))

    def _text(self) -> str:
        seconds = time.monotonic() - self.started
        return progress_text(self.label, self.done, self.total, self.unit, seconds, self.meter)


def progress_text(label: str, done: int, total: int, unit: str, seconds: float, meter: Meter | None) -> str:
    """The progress of a stage after `seconds`, with rate, remaining time and cost:

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


def publish_safely(publish: Callable[[], Any]) -> Any:
    """The result of `publish`; None and a warning if it fails, since the UI's content never fails a run."""
    try:
        return publish()
    except Exception as error:  # of the server, the network or the artifact's own code
        announce_problem(f"the UI does not show everything: {type(error).__name__}: {error}")
        return None


def announce(stage: str, reused: int, computed: int, unit: str, seconds: float) -> None:
    """One line for a finished stage."""
    done = f"{computed:,} {unit} computed" if computed else f"cached, {reused:,} {unit} reused"
    if computed and reused:
        done += f", {reused:,} reused"
    _line(f"  {stage:<28} {done} ({seconds:.1f} s)")


def announce_fact(text: str) -> None:
    """One line with a measurement."""
    _line(f"  {text}")


def announce_problem(text: str) -> None:
    """One line, a warning, for a problem that the run handles."""
    if _console is not None:
        _console.print(f"  {text}", highlight=False, markup=False, style="yellow")
    _log(logging.WARNING, text)


@contextmanager
def stage_progress(
    label: str, total: int, unit: str = "rows", *, machines: int = 1
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Enter it inside a flow or task run, which owns the artifact.

    machines : number that compute the stage at once, for its cost.
    """
    bar = _bar(unit) if _console is not None and _console.is_terminal else None
    costs = publish_safely(lambda: meter(experiment_of_run(), label, machines))
    reporter = _Reporter(label, total, unit, _line if bar is None else _log_line, costs)
    with spending.held(label, machines), closing(reporter):
        if bar is None:
            yield reporter.advance
            return
        with bar:
            task = bar.add_task(label, total=total)

            def advance(rows: int) -> None:
                bar.advance(task, rows)
                reporter.advance(rows)

            yield advance


def _bar(unit: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate()]
    return Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=_console, transient=True)


def _line(text: str) -> None:
    if _console is not None:
        _console.print(text, highlight=False, markup=False)
    _log_line(text)


def _log_line(text: str) -> None:
    _log(logging.INFO, text)


def _log(level: int, text: str) -> None:
    """Write a line to the run's log, and to that of the outermost run, which is the one that people open."""
    try:
        logger = get_run_logger()
    except MissingContextError:  # a thread of an engine, outside of the run
        return
    logger.log(level, text)
    _log_outermost(level, text)


def show_core_logs() -> None:
    """Show the core's INFO lines in the run's log, and its warnings in that of the outermost run as well.

    Prefect adds a handler for the run's log, but sets no level.
    """
    core = logging.getLogger("qrpo")
    core.setLevel(logging.INFO)
    if not any(isinstance(each, _ToOutermost) for each in core.handlers):
        core.addHandler(_ToOutermost(logging.WARNING))


class _ToOutermost(logging.Handler):
    """Writes the records of a run to the log of the run that started it."""

    def emit(self, record: logging.LogRecord) -> None:
        _log_outermost(record.levelno, record.getMessage())


#: Warnings that an outermost run has in its log, by that run: several parts may say the same.
_warned: set[tuple[str, str]] = set()


def _log_outermost(level: int, text: str) -> None:
    run = runtime.flow_run.id
    outermost = _outermost(run)
    if level >= logging.WARNING:
        told = (outermost or run or "", text)
        if told in _warned:
            return
        _warned.add(told)
    if outermost is not None:
        _outermost_log().log(level, text, extra={"flow_run_id": outermost})


@lru_cache(maxsize=1)
def _outermost_log() -> logging.Logger:
    """A logger to the server alone: the console has the line already."""
    logger = logging.getLogger("qrpo.progress")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers = [APILogHandler()]
    return logger


@lru_cache(maxsize=64)
def _outermost(run: str | None) -> str | None:
    """The run that started the current one, directly or not; None if nobody did, or the server is away."""
    try:
        outermost: str | None = runtime.flow_run.root_flow_run_id
    except Exception:  # of the server or the network: a line in the log never fails a run
        return None
    return outermost if outermost and outermost != run else None
