"""`evaluate`: compare the trained policy with the reference on held-out prompts, and write the report."""

from __future__ import annotations

from prefect import flow

from tasks.evaluate_benchmarks import evaluate_benchmarks, prepare_benchmarks, score_benchmarks
from tasks.evaluate_policy import (
    annotate_held_out,
    evaluate_policy,
    sample_held_out,
    score_held_out_logprobs,
    write_report,
)
from tasks.experiment_form import FormExperiment
from tasks.pipeline_run import PipelineRun
from tasks.run_names import run_name
from tasks.stages import Stage
from tasks.ui_artifacts import publish_result


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(experiment: FormExperiment, pool: str | None = None) -> list[Stage]:
    """Sample from both policies and score, as `precompute` does, on prompts outside the training set.

    Args:
        experiment: What to evaluate.
        pool: Work pool whose workers compute the missing rows; ray or ray://HOST:PORT for a Ray cluster; none
            for this run itself.
    """
    with PipelineRun(experiment, pool) as run:
        prepared = prepare_benchmarks(run)
        before, end = run.experiment_steps.before, run.evaluation()
        completions_before = sample_held_out(run, before)
        rewards_before = annotate_held_out(run, before, completions_before)
        scores_before = score_benchmarks(run, [each.before for each in end.benchmarks], prepared)
        completions_after = sample_held_out(run, end.after)
        rewards_after = annotate_held_out(run, end.after, completions_after)
        scores_after = score_benchmarks(run, [each.after for each in end.benchmarks], prepared)
        logprobs = score_held_out_logprobs(run, completions_after)
        evaluated = evaluate_policy(run, [*rewards_before, *rewards_after, *logprobs])
        benchmarks = evaluate_benchmarks(run, scores_before, scores_after)
        write_report(run, [evaluated, *benchmarks])
    publish_result(run.workspace)
    return run.stages
