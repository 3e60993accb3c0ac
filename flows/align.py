"""`align`: all of it, in order."""

from __future__ import annotations

from prefect import flow

from flows.evaluate import evaluate
from flows.precompute import precompute
from flows.train import train
from qrpo_core.config import Experiment
from tasks.stages import Stage


@flow(name="align", flow_run_name="align-{experiment.name}")
def align(experiment: Experiment) -> list[Stage]:
    """From an experiment to a trained policy and the report that shows whether it worked."""
    return [*precompute(experiment), *train(experiment), *evaluate(experiment)]
