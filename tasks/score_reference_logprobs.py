"""Stage: log-probs of the training completions under the reference policy."""

from __future__ import annotations

from tasks.pipeline_run import PipelineRun, Result


def score_reference_logprobs(run: PipelineRun, quantiles: Result) -> list[Result]:
    """Compute log pi_ref of every completion that the quantiles selected, as the trainer computes it."""
    return [run.compute_rows(step, quantiles) for step in run.round.logprob_steps]
