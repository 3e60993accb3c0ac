"""Stage: score completions with the experiment's reward."""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.pipeline.row_steps import RewardStep, SampleStep
from tasks.pipeline_run import PipelineRun, Result


def annotate_rewards(run: PipelineRun, completions: Sequence[Result], *prompts: Result) -> list[Result]:
    """Score the sampled completions and the data set's own completions.

    Returns `prompts` where nothing is scored because the data set has grades or labels.
    """
    rewards = []
    for step in run.round.row_steps:
        if isinstance(step, RewardStep):
            sampled = isinstance(step.completions, SampleStep)
            rewards.append(run.compute_rows(step, *(completions if sampled else prompts)))
    return rewards or list(prompts)
