"""`align`: all of it, in order."""

from __future__ import annotations

from prefect import flow

from flows.evaluate import evaluate
from flows.precompute import precompute
from flows.train import train
from qrpo_core.config import Experiment
from tasks.names import run_name
from tasks.stages import Stage, workspace_of
from tasks.tables import publish_plan, publish_result, publish_stages


@flow(name="align", flow_run_name=run_name)
def align(experiment: Experiment, pool: str | None = None) -> list[Stage]:
    """From an experiment to a trained policy and the report that shows whether it worked.

    Args:
        experiment: What to compute.
        pool: Work pool whose workers compute the missing rows before training; ray or ray://HOST:PORT: a Ray
            cluster does; none: this run does.
    """
    workspace = workspace_of(experiment)
    publish_plan(workspace)
    stages = [*precompute(experiment, pool), *train(experiment), *evaluate(experiment)]
    publish_stages(stages)
    publish_result(workspace)
    return stages
