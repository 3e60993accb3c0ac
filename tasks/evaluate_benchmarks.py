"""Stages: both policies on the benchmarks of the evaluation, by the code of the stages before them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from qrpo_core.pipeline import benchmarks, prompts, usable_rows
from qrpo_core.pipeline.benchmarks import BenchmarkSide
from qrpo_core.pipeline.experiment_steps import stored_reference
from qrpo_core.pipeline.stage_names import (
    CHECK_BENCHMARK,
    EVALUATE_BENCHMARK,
    PREPARE_BENCHMARK,
    of_benchmark,
)
from tasks.pipeline_run import PipelineRun, Result


def prepare_benchmarks(run: PipelineRun) -> list[Result]:
    """Read the prompts of each benchmark, and check that the policy and its reward can use them."""
    checked = []
    for name in run.experiment.evaluation.benchmarks:
        own, reference = run.workspace.benchmark(name), stored_reference(run.workspace)
        recipe = prompts.recipe(own)
        build = partial(prompts.build, own, recipe)
        prepared = run.build_artifact(of_benchmark(PREPARE_BENCHMARK, name), recipe, build)
        tables = prompts.stored(own, own.artifacts.get(recipe))
        check = partial(usable_rows.build, own, recipe, tables, reference)
        usable = usable_rows.recipe(own, recipe, reference)
        checked.append(run.build_artifact(of_benchmark(CHECK_BENCHMARK, name), usable, check, prepared))
    return checked


def score_benchmarks(
    run: PipelineRun, sides: Sequence[BenchmarkSide], prepared: Sequence[Result]
) -> list[Result]:
    """Sample one policy's completions of each benchmark, and score them. Returns the rewards' results."""
    scored = []
    for side, inputs in zip(sides, prepared, strict=True):
        completions = run.compute_rows(side.samples, inputs)
        scored.append(run.compute_rows(side.rewards, completions))
    return scored


def evaluate_benchmarks(run: PipelineRun, before: Sequence[Result], after: Sequence[Result]) -> list[Result]:
    """Compare both policies on each benchmark."""
    steps = run.evaluation().benchmarks  # named by what the rewards have become
    return [
        run.build_artifact(
            of_benchmark(EVALUATE_BENCHMARK, each.name),
            each.result,
            partial(benchmarks.build, run.workspace, each),
            *inputs,
        )
        for each, *inputs in zip(steps, before, after, strict=True)
    ]
