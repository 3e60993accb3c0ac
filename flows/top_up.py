"""`top_up`: bring every prompt to its budget, or to a precision, in bounded steps; fit for every night."""

from __future__ import annotations

from functools import partial

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps.top_up import Portion, next_portion
from qrpo_core.steps.workspace import Workspace
from tasks.blocks import fill, mended
from tasks.names import run_name
from tasks.stages import Stage, workspace_of
from tasks.tables import publish_plan, publish_stages


@flow(name="top-up", flow_run_name=run_name)
def top_up(experiment: Experiment) -> list[Stage]:
    """Draw and score missing references, at most `top_up.rows_per_run` of them; run it again for more.

    With `top_up.standard_error`, prompts whose quantiles are less certain than that get a larger budget.
    """
    workspace = workspace_of(experiment)
    publish_plan(workspace)
    stages: list[Stage] = []
    left = experiment.top_up.rows_per_run
    while left > 0 and (portion := next_portion(workspace, left, started=bool(stages))) is not None:
        stages += mended(partial(_fill, workspace, portion))
        left -= portion.rows
    publish_stages(stages)
    return stages


def _fill(workspace: Workspace, portion: Portion) -> list[Stage]:
    return [fill(workspace, step) for step in portion.steps]
