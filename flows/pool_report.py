"""`pool_report`: what the references and their rewards say before training, beside other judges."""

from __future__ import annotations

from prefect import flow

from qrpo_core.pipeline.pool_report import pool_steps
from tasks.experiment_form import FormExperiment
from tasks.pipeline_run import PipelineRun, retry_on_damage
from tasks.pool_report import annotate_pool, write_pool_report
from tasks.run_names import run_name
from tasks.stages import Stage
from tasks.ui_artifacts import publish_pool_report


@flow(name="pool-report", flow_run_name=run_name)
def pool_report(experiment: FormExperiment) -> list[Stage]:
    """Let each judge of the evaluation score a sample of the pool, and write the pool report.

    The pool must be in the store: run `precompute` first.
    """
    with PipelineRun(experiment) as run:
        report_pool(run)
    publish_pool_report(run.workspace)
    return run.stages


@retry_on_damage
def report_pool(run: PipelineRun) -> None:
    """The stages from a stored pool to its report."""
    steps = pool_steps(run.experiment_steps)
    steps.require_pool()
    scores = annotate_pool(run, steps)
    write_pool_report(run, steps, scores)
