"""Stage: sample completions of the training prompts."""

from __future__ import annotations

from qrpo_core.pipeline.row_steps import SampleStep
from tasks.pipeline_run import PipelineRun, Result


def sample_references(run: PipelineRun, *prompts: Result) -> list[Result]:
    """Sample the missing completions: references from the reference policy, later ones from the round's.

    [] where the objective needs no ranking and trains on the data set's completions.
    """
    return [run.compute_rows(step, *prompts) for step in run.round.row_steps if isinstance(step, SampleStep)]
