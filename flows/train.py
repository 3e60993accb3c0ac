"""`train`: fit the policy to the stored targets, in one round or in several."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps.chain import stored_chain
from tasks.events import TRAINED, tell
from tasks.names import run_name
from tasks.rounds import fit, prepare
from tasks.stages import Stage, workspace_of
from tasks.tables import publish_plan, publish_stages


@flow(name="train", flow_run_name=run_name)
def train(experiment: Experiment, then: Literal["stop", "evaluate"] = "stop") -> list[Stage]:
    """Training on what `precompute` made, then `rounds.count` - 1 rounds of sampling and training on.

    Args:
        experiment: What to train.
        then: What the deployments do when the policy is there.
    """
    workspace = workspace_of(experiment)
    publish_plan(workspace)
    stages = [fit(workspace, stored_chain(workspace).first)]
    for number in range(2, experiment.rounds.count + 1):
        stages += next_round(experiment, number)
    publish_stages(stages)
    tell(TRAINED, experiment, then)
    return stages


@flow(name="round", flow_run_name=run_name)
def next_round(experiment: Experiment, number: int) -> list[Stage]:
    """Sample from the policy so far, score, rank among the fixed references, train on."""
    workspace = workspace_of(experiment)
    round_ = stored_chain(workspace).round(number)
    return [*prepare(workspace, round_), fit(workspace, round_.renamed())]
