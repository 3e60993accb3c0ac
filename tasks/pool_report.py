"""Stages of `qrpo pool`: judges score a sample of the pool, and the pool report is written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from qrpo_core.pipeline import pool_report
from qrpo_core.pipeline.pool_report import PoolSteps
from qrpo_core.pipeline.stage_names import WRITE_POOL_REPORT
from tasks.pipeline_run import PipelineRun, Result


def annotate_pool(run: PipelineRun, steps: PoolSteps) -> list[Result]:
    """Score the sample of the pool with each judge of the evaluation."""
    return [run.compute_rows(step) for step in steps.judges.values()]


def write_pool_report(run: PipelineRun, steps: PoolSteps, scores: Sequence[Result]) -> Result:
    """Write the pool report, named by what the judges' scores have become."""
    return run.build_artifact(WRITE_POOL_REPORT, steps.recipe, partial(pool_report.build, steps), *scores)
