"""`train`: fit the policy to the stored targets, in one or several rounds."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow

from flows.precompute import make_training_set
from qrpo_core.config import Experiment
from tasks.events import TRAINED, emit_event
from tasks.experiment_form import FormExperiment
from tasks.pipeline_run import PipelineRun
from tasks.run_names import run_name
from tasks.stages import Stage
from tasks.train_policy import train_policy


@flow(name="train", flow_run_name=run_name)
def train(
    experiment: FormExperiment, then: Literal["stop", "evaluate"] = "stop", pool: str | None = None
) -> list[Stage]:
    """Train on the training set of `precompute`; then sample and train for `rounds.count` - 1 more rounds.

    Args:
        experiment: What to train.
        then: The deployment that starts next.
        pool: Work pool whose workers compute the missing rows of later rounds; ray or ray://HOST:PORT for a
            Ray cluster; none for this run itself.
    """
    with PipelineRun(experiment) as run:
        before: Any = train_policy(run)
        for number in range(2, experiment.rounds.count + 1):
            before = next_round(experiment, number, pool, wait_for=[before])
            run.stages += before
    emit_event(TRAINED, experiment, then)
    return run.stages


@flow(name="round", flow_run_name=run_name)
def next_round(experiment: Experiment, number: int, pool: str | None = None) -> list[Stage]:
    """Sample from the current policy, score, rank among the same references, continue training."""
    with PipelineRun(experiment, pool) as run:
        run.start_round(number)
        training_set = make_training_set(run)
        train_policy(run, training_set)
    return run.stages
