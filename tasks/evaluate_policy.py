"""Stages: compare the trained policy with the reference on held-out prompts, and write the report.

Completions are sampled and scored by the code that samples and scores the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from qrpo_core.pipeline import evaluation, run_report
from qrpo_core.pipeline.evaluation import HeldOutSteps
from qrpo_core.pipeline.stage_names import EVALUATE_POLICY, WRITE_REPORT
from tasks.pipeline_run import PipelineRun, Result


def sample_held_out(run: PipelineRun, steps: HeldOutSteps) -> Result:
    """Sample completions of the held-out prompts."""
    return run.compute_rows(steps.samples)


def annotate_held_out(run: PipelineRun, steps: HeldOutSteps, completions: Result) -> list[Result]:
    """Score held-out completions with the experiment's reward and with the evaluation's judges."""
    return [run.compute_rows(step, completions) for step in (steps.rewards, *steps.judges.values())]


def score_held_out_logprobs(run: PipelineRun, completions: Result) -> list[Result]:
    """Log-probs of the trained policy's completions under it and under the reference, for the KL."""
    return [run.compute_rows(step, completions) for step in run.evaluation().divergence]


def evaluate_policy(run: PipelineRun, inputs: Sequence[Result]) -> Result:
    """Compare both policies: mean rewards, win rate, KL, lengths, with intervals over prompts."""
    steps = run.evaluation()  # named by what the rewards have become
    build = partial(evaluation.build, run.workspace, steps)
    return run.build_artifact(EVALUATE_POLICY, steps.evaluate, build, *inputs)


def write_report(run: PipelineRun, evaluated: Sequence[Result]) -> Result:
    """Write the HTML report of the result, with its figures and lineage."""
    steps, end = run.experiment_steps, run.evaluation()
    build = partial(run_report.build, run.workspace, steps, end)
    return run.build_artifact(WRITE_REPORT, end.report, build, *evaluated)
