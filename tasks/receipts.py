"""Count what a run spends, and show its receipt at the end, also of a run that stops at its cap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.artifacts import create_table_artifact

from qrpo_core.common.errors import QRPOError
from qrpo_core.config import Experiment
from qrpo_core.inspection.stage_work import work_of
from qrpo_core.reporting.receipt import Line, line, receipt, receipt_lines, receipt_rows
from tasks.progress import announce_fact, publish_safely
from tasks.spending import is_top_level, spending


@contextmanager
def counted_run(experiment: Experiment) -> Iterator[None]:
    """While entered, the outermost flow run spends; its receipt is shown when it leaves, unless it broke."""
    if not is_top_level():
        yield
        return
    spending.begin(experiment)
    try:
        yield
    except QRPOError:
        show_receipt(experiment)
        raise
    show_receipt(experiment)


def show_receipt(experiment: Experiment) -> None:
    """Write the receipt to terminal or log, and publish it."""
    lines, currency = receipt_of(experiment), experiment.service.currency
    for text in receipt_lines(lines, currency):
        announce_fact(text)
    head, *rows = receipt_rows(lines, currency)
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    about = "What the run paid, what it reused, and what all of it would have cost anew"
    publish_safely(lambda: create_table_artifact(cells, key="receipt", description=about))


def receipt_of(experiment: Experiment) -> list[Line]:
    """The receipt of what this process's run has done so far."""
    price = experiment.service.gpu_hour_price
    stages = spending.stages
    saved = sum(each.reused_seconds * work_of(experiment, each.stage).gpus for each in stages) / 3600
    paid_seconds = sum(each.seconds for each in stages)
    saved_seconds = sum(each.reused_seconds for each in stages)
    return receipt(
        line("paid", sum(each.computed for each in stages), paid_seconds, spending.gpu_hours, price),
        line("reused", sum(each.reused for each in stages), saved_seconds, saved, price),
    )
