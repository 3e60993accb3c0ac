"""`train`: fit the policy to the stored targets."""

from __future__ import annotations

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps import training
from qrpo_core.steps.chain import stored_chain
from qrpo_core.store.artifacts import Manifest
from tasks.progress import stage_progress
from tasks.stages import Stage, make, workspace_of
from tasks.tables import publish_stages


@flow(name="train", flow_run_name="train-{experiment.name}")
def train(experiment: Experiment) -> list[Stage]:
    """One training run on the training set that `precompute` made."""
    workspace = workspace_of(experiment)
    chain = stored_chain(workspace)

    def build() -> Manifest:
        training_set = workspace.artifacts.get(chain.training_set)
        steps = training.optimiser_steps(experiment.training, training_set.facts["rows"])
        with stage_progress("train", steps, "steps") as advance:
            return training.build(
                workspace, chain.train, training_set, chain.reference, lambda *step: advance(1)
            )

    stages = [make(workspace, "train", chain.train, build)]
    publish_stages(stages)
    return stages
