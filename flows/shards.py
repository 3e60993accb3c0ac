"""`sample-shard`, `annotate-shard`: compute a shard of a stage's missing rows; `precompute` starts them."""

from __future__ import annotations

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.pipeline.shards import Shard, step_of
from tasks.pipeline_run import PipelineRun, retry_on_damage
from tasks.stages import Stage


@flow(name="sample-shard")
def sample_shard(experiment: Experiment, shard: Shard) -> list[Stage]:
    """Sample the completions of a shard, or compute its log-probs, with an engine that is loaded once."""
    return _compute(experiment, shard)


@flow(name="annotate-shard")
def annotate_shard(experiment: Experiment, shard: Shard) -> list[Stage]:
    """Score the completions of a shard."""
    return _compute(experiment, shard)


def _compute(experiment: Experiment, shard: Shard) -> list[Stage]:
    with PipelineRun(experiment) as run:
        compute_shard(run, shard)
    return run.stages


@retry_on_damage
def compute_shard(run: PipelineRun, shard: Shard) -> None:
    """Compute the rows of a shard that the store lacks."""
    run.compute_rows(step_of(run.workspace, shard))
