"""`precompute`: prompts, reference samples, rewards, quantiles, log-probs, training set."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.chain import stored_chain
from tasks.events import PRECOMPUTED, tell
from tasks.names import run_name
from tasks.pool import compute_on
from tasks.rounds import check_rows, prepare, refuse
from tasks.stages import Stage, make, workspace_of
from tasks.tables import publish_plan, publish_stages


@flow(name="precompute", flow_run_name=run_name)
def precompute(
    experiment: Experiment,
    pool: str | None = None,
    then: Literal["stop", "train", "train, evaluate"] = "stop",
) -> list[Stage]:
    """Everything before training. Only what the store lacks is computed; raise the budget and run again.

    Rewards from which nothing can be learned fail it, before log-probs are bought for them.

    Args:
        experiment: What to compute.
        pool: Work pool whose workers compute the missing rows, a share each; ray or ray://HOST:PORT: a Ray
            cluster does; none: this run computes them.
        then: What the deployments do when everything is there.
    """
    workspace = workspace_of(experiment)
    publish_plan(workspace)
    stages = []
    source = policies.source_of(workspace)
    if source.needs_materialising:
        recipe = policies.recipe(workspace, source)
        stages.append(make(workspace, "convert model", recipe, lambda: policies.convert(workspace, source)))
    recipe = prompts.recipe(workspace)
    stages.append(make(workspace, "prompts", recipe, lambda: prompts.build(workspace, recipe)))
    stages.append(check_rows(workspace, recipe))
    with compute_on(pool) as compute:
        stages += prepare(workspace, stored_chain(workspace).first, compute)
    publish_stages(stages)
    refuse(stored_chain(workspace).first.renamed())
    tell(PRECOMPUTED, experiment, then)
    return stages
