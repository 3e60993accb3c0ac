"""`precompute`: prompts, reference samples, rewards, quantiles, log-probs, training set."""

from __future__ import annotations

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.chain import stored_chain
from tasks.stages import Stage, make, prepare, workspace_of
from tasks.tables import publish_stages


@flow(name="precompute", flow_run_name="precompute-{experiment.name}")
def precompute(experiment: Experiment) -> list[Stage]:
    """Everything before training. Only what the store lacks is computed; raise the budget and run again."""
    workspace = workspace_of(experiment)
    stages = []
    source = policies.source_of(workspace)
    if source.needs_materialising:
        recipe = policies.recipe(workspace, source)
        stages.append(make(workspace, "convert model", recipe, lambda: policies.convert(workspace, source)))
    recipe = prompts.recipe(workspace)
    stages.append(make(workspace, "prompts", recipe, lambda: prompts.build(workspace, recipe)))
    stages += prepare(workspace, stored_chain(workspace).first)
    publish_stages(stages)
    return stages
