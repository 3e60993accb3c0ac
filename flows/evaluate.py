"""`evaluate`: the trained policy beside the reference on held-out prompts, and the report."""

from __future__ import annotations

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps import evaluation
from qrpo_core.steps.chain import stored_chain
from tasks.blocks import fill
from tasks.names import run_name
from tasks.stages import Stage, make, workspace_of
from tasks.tables import publish_plan, publish_result, publish_stages


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(experiment: Experiment) -> list[Stage]:
    """The same sampling and scoring code as `precompute`, on prompts that training never saw."""
    workspace = workspace_of(experiment)
    publish_plan(workspace)
    chain = stored_chain(workspace)
    end = chain.after(chain.last())
    stages = [fill(workspace, step) for step in (*chain.before, *end.after, *end.divergence)]
    end = chain.after(end.round)  # named by what the rewards have become
    stages.append(make(workspace, "evaluate", end.evaluate, lambda: evaluation.build(workspace, chain, end)))
    stages.append(
        make(workspace, "report", end.report, lambda: evaluation.build_report(workspace, chain, end))
    )
    publish_stages(stages)
    publish_result(workspace)
    return stages
