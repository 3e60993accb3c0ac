"""Stage: join everything that training needs in one table."""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.pipeline.stage_names import ASSEMBLE_TRAINING_SET
from tasks.pipeline_run import PipelineRun, Result
from tasks.progress import announce_fact


def assemble_training_set(run: PipelineRun, quantiles: Result, logprobs: Sequence[Result]) -> Result:
    """Join the selected completions with their tokens, rank counts and reference log-probs.

    Raises EngineError where the sampler's log-probs are asked for and too far from the training model's.
    """
    round_ = run.round
    name = round_.label(ASSEMBLE_TRAINING_SET)
    result = run.build_artifact(
        name, round_.training_set_recipe, round_.build_training_set, quantiles, *logprobs
    )
    if measured := round_.check_reference_logprobs():
        announce_fact(f"reference log-probs are {measured}")
    return result
