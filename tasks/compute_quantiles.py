"""Stage: for every training completion, count its prompt's references with a smaller and an equal reward.

The quantile follows from the two counts and the tie method.
"""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.stage_names import COMPUTE_QUANTILES
from tasks.pipeline_run import PipelineRun, Result


def compute_quantiles(run: PipelineRun, rewards: Sequence[Result]) -> Result:
    """Select the training completions and count the references below and equal to each.

    Raises ObjectiveError where the rewards have no signal to learn, before log-probs are computed.
    """
    round_ = run.settle_rewards()
    quantiles = run.build_artifact(
        round_.label(COMPUTE_QUANTILES), round_.quantiles_recipe, round_.build_quantiles, *rewards
    )
    refuse_without_signal(round_)
    return quantiles


def refuse_without_signal(round_: Round) -> None:
    """Raise ObjectiveError where the rank counts of a round have no signal to learn."""
    if (problem := round_.nothing_to_learn()) is not None:
        raise problem
