"""The GPU hours that a run spends, its cap, and the receipt at its end.

A stage spends while it computes: GPUs x machines x time, loading included (on a machine without a GPU its CPU
stands for one). The cap is looked at between blocks, between optimiser steps and while shards work, so a run
spends at most one block or one step more. What is committed stays, and the next run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import FlowRunContext

from qrpo_core.common.errors import GO_ON, CapError
from qrpo_core.config import Experiment
from qrpo_core.inspection.stage_work import work_of
from tasks.stage import Stage


class Spending:
    """What the run of this process has spent so far; a subflow spends of the run that called it.

    stages : those that it finished.
    """

    def __init__(self) -> None:
        self._experiment: Experiment | None = None
        self._closed = 0.0
        self._open: list[tuple[int, float]] = []
        self.stages: list[Stage] = []

    def begin(self, experiment: Experiment) -> None:
        """Start counting at 0."""
        self._experiment, self._closed, self._open, self.stages = experiment, 0.0, [], []

    @contextmanager
    def held(self, stage: str, machines: int = 1) -> Iterator[None]:
        """Count the GPUs of the stage with this label while entered."""
        gpus = 0 if self._experiment is None else machines * work_of(self._experiment, stage).gpus
        held = (gpus, time.monotonic())
        self._open.append(held)
        try:
            yield
        finally:
            if held in self._open:
                self._open.remove(held)
            self._closed += gpus * (time.monotonic() - held[1])

    @property
    def gpu_hours(self) -> float:
        """Spent until now, stages in progress included."""
        now = time.monotonic()
        return (self._closed + sum(gpus * (now - since) for gpus, since in self._open)) / 3600

    @property
    def over(self) -> bool:
        """Whether the cap is reached."""
        cap = None if self._experiment is None else self._experiment.service.max_gpu_hours
        return cap is not None and self.gpu_hours >= cap

    def check(self, stage: str) -> None:
        """Raise CapError if the cap is reached. stage : the label of the one that would go on."""
        if self.over:
            raise CapError(self.why, where=stage, remedy=GO_ON)

    @property
    def why(self) -> str:
        """Why the run stops, in words."""
        cap = 0.0 if self._experiment is None else self._experiment.service.max_gpu_hours
        return f"stopped at the cap of {cap:g} GPU hours, of which {self.gpu_hours:.3g} are spent"


def is_top_level() -> bool:
    """Whether the current flow run is not a subflow of another."""
    run = FlowRunContext.get()
    return run is not None and run.flow_run is not None and run.flow_run.parent_task_run_id is None


spending = Spending()
