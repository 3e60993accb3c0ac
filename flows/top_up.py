"""`top_up`: add references in bounded runs, for a nightly schedule."""

from __future__ import annotations

from prefect import flow

from qrpo_core.pipeline.top_up import Portion, next_portion
from tasks.experiment_form import FormExperiment
from tasks.pipeline_run import PipelineRun, retry_on_damage
from tasks.run_names import run_name
from tasks.stages import Stage


@flow(name="top-up", flow_run_name=run_name)
def top_up(experiment: FormExperiment) -> list[Stage]:
    """Sample and score missing references, at most `top_up.rows_per_run` of them in a run.

    With `top_up.standard_error`, prompts whose quantiles have a larger standard error get a larger budget.
    """
    with PipelineRun(experiment) as run:
        left = experiment.top_up.rows_per_run
        while left > 0 and (portion := next_portion(run.workspace, left, started=bool(run.stages))):
            draw_and_annotate(run, portion)
            left -= portion.rows
    return run.stages


@retry_on_damage
def draw_and_annotate(run: PipelineRun, portion: Portion) -> None:
    """Sample the missing references of some prompts and score them."""
    samples, rewards = portion.steps
    completions = run.compute_rows(samples)
    run.compute_rows(rewards, completions)
