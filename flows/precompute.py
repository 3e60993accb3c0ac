"""`precompute`: everything before training, in the order of the README's diagram."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from tasks.annotate_rewards import annotate_rewards
from tasks.assemble_training_set import assemble_training_set
from tasks.compute_quantiles import compute_quantiles
from tasks.events import PRECOMPUTED, emit_event
from tasks.experiment_form import FormExperiment
from tasks.pipeline_run import PipelineRun, Result, retry_on_damage
from tasks.prepare_policy import prepare_policy
from tasks.prepare_prompts import check_rows, prepare_prompts
from tasks.run_names import run_name
from tasks.sample_references import sample_references
from tasks.score_reference_logprobs import score_reference_logprobs
from tasks.stages import Stage


@flow(name="precompute", flow_run_name=run_name)
def precompute(
    experiment: FormExperiment,
    pool: str | None = None,
    then: Literal["stop", "train", "train, evaluate"] = "stop",
) -> list[Stage]:
    """Compute everything before training that the store lacks. Raise the budget and run again for more.

    Args:
        experiment: What to compute.
        pool: Work pool whose workers compute the missing rows, a shard each; ray or ray://HOST:PORT for a Ray
            cluster; none for this run itself.
        then: The deployments that start next.
    """
    with PipelineRun(experiment, pool) as run:
        policy = prepare_policy(run)
        prompts = prepare_prompts(run)
        usable = check_rows(run, prompts, policy)
        make_training_set(run, usable)
    emit_event(PRECOMPUTED, experiment, then)
    return run.stages


@retry_on_damage
def make_training_set(run: PipelineRun, *prompts: Result) -> Result:
    """The stages from prompts to a training set. ObjectiveError where the rewards have no signal."""
    completions = sample_references(run, *prompts)
    rewards = annotate_rewards(run, completions, *prompts)
    quantiles = compute_quantiles(run, rewards)
    logprobs = score_reference_logprobs(run, quantiles)
    return assemble_training_set(run, quantiles, logprobs)
