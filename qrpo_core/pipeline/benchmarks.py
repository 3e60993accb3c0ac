"""Benchmarks of the evaluation: their prompts, both policies' completions of these, and the result.

A benchmark's rows are those of an experiment with its prompts, reward and sampling on the same store
(`Workspace.benchmark`). So sampling, scoring, checks and top-up of its rows are the pipeline's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import QRPOError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.benchmarks import BenchmarkConfig
from qrpo_core.data.unusable import UnusableError
from qrpo_core.evaluation.benchmarks import BenchmarkResult, evaluate_benchmark
from qrpo_core.pipeline import alpaca_eval, policies, prompts, usable_rows
from qrpo_core.pipeline.joined_rewards import joined_rewards
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.pipeline.row_steps import BlockStep, RewardStep, SampleStep
from qrpo_core.pipeline.stage_names import ANNOTATE_BENCHMARK, SAMPLE_BENCHMARK, of_benchmark
from qrpo_core.pipeline.usable_rows import UsableTables
from qrpo_core.pipeline.workspace import Built, Workspace
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 1


@dataclass(frozen=True)
class BenchmarkSide:
    """One policy's completions of a benchmark, and their rewards."""

    samples: SampleStep
    rewards: RewardStep

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.samples, self.rewards))


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose prompts are known.

    workspace : of its rows. prompts_recipe, usable_recipe : name its prompts and their check.
    tables : its usable prompts. everything : all of its prompts, in the order of their source.
    """

    name: str
    workspace: Workspace
    reference: Policy
    prompts_recipe: Recipe
    usable_recipe: Recipe
    tables: UsableTables
    everything: PromptTables

    @property
    def before(self) -> BenchmarkSide:
        """The reference policy's side."""
        return self.side(self.reference, "before")

    def side(self, policy: Policy, when: str) -> BenchmarkSide:
        """A policy's completions and their rewards. when : "before" or "after" training."""
        count = self.workspace.experiment.evaluation.samples_per_prompt
        asked = prompts.of_split(self.tables.prompts, "held_out")
        label = of_benchmark(SAMPLE_BENCHMARK, self.name, when)
        samples = SampleStep(self.workspace, policy, asked, count, label)
        return BenchmarkSide(samples, RewardStep(samples, of_benchmark(ANNOTATE_BENCHMARK, self.name, when)))


def benchmark(workspace: Workspace, name: str, reference: Policy) -> Benchmark:
    """A benchmark of an experiment, with its prompts from the store, or else from their source."""
    own = workspace.benchmark(name)
    asked = prompts.recipe(own)
    everything = prompts.find(own, asked)
    usable = usable_rows.recipe(own, asked, reference)
    converted = policies.reference(own, policies.source_of(own))
    tables = usable_rows.usable(own, asked, everything, converted)
    return Benchmark(name, own, reference, asked, usable, tables, everything)


def benchmarks(workspace: Workspace, reference: Policy) -> list[Benchmark]:
    """Every benchmark of an experiment."""
    return [benchmark(workspace, name, reference) for name in workspace.experiment.evaluation.benchmarks]


@dataclass(frozen=True)
class BenchmarkSteps:
    """A benchmark on both sides, and the recipe of its result.

    training_prompts : PROMPTS rows of the experiment; some may be prompts of the benchmark, too.
    """

    benchmark: Benchmark
    config: BenchmarkConfig
    before: BenchmarkSide
    after: BenchmarkSide
    training_prompts: pa.Table
    result: Recipe

    @property
    def name(self) -> str:
        return self.benchmark.name


def benchmark_steps(
    workspace: Workspace, found: Benchmark, trained: Policy, prompts_recipe: Recipe, table: pa.Table
) -> BenchmarkSteps:
    """A benchmark with both policies. prompts_recipe, table : the prompts of the training."""
    config = workspace.experiment.evaluation.benchmarks[found.name]
    before, after = found.before, found.side(trained, "after")
    train = prompts.of_split(table, "train")
    settings = workspace.experiment.evaluation
    fields: dict[str, Any] = {
        name: getattr(settings, name) for name in ("confidence", "resamples", "seed")
    } | {"length_controlled": config.controls_length}
    sides = {"before": before.rewards, "after": after.rewards}
    if retryable := {side: each.retryable_digest for side, each in sides.items() if each.retryable_digest}:
        fields["retryable"] = retryable
    if left_out := found.tables.left_out.digest("held_out"):
        fields["left_out"] = left_out
    inputs = {f"rewards_{side}": each.recipe.key for side, each in sides.items()}
    inputs |= {"prompts": found.prompts_recipe.key, "training_prompts": prompts_recipe.key}
    return BenchmarkSteps(found, config, before, after, train, Recipe("benchmark", VERSION, fields, inputs))


def build(workspace: Workspace, steps: BenchmarkSteps) -> Manifest:
    """Commit `benchmark.json`, and for alpaca_eval both policies' outputs in the package's format."""

    def make(scratch: Path) -> Built:
        sides = {"before": steps.before, "after": steps.after}
        rows = {side: joined_rewards(each.rewards) for side, each in sides.items()}
        files: dict[str, Path | bytes] = {}
        measured: Mapping[str, Mapping[str, float]] = {}
        if steps.config.reward.kind == "alpaca_eval":
            table = steps.benchmark.everything.prompts
            outputs = {
                side: alpaca_eval.outputs(table, each, f"{workspace.experiment.name}, {side}")
                for side, each in rows.items()
            }
            files |= {f"model_outputs_{side}.json": _json(each.rows) for side, each in outputs.items()}
            measured = alpaca_eval.measure(steps.config, outputs)
        trained = pc.is_in(rows["before"]["prompt_id"], value_set=steps.training_prompts["prompt_id"])
        result = evaluate_benchmark(
            rows["before"],
            rows["after"],
            workspace.experiment.evaluation,
            name=steps.name,
            kind=steps.config.reward.kind,
            trained_on=len(set(rows["before"].filter(trained)["prompt_id"].to_pylist())),
            alpaca_eval=measured,
        )
        return files | {"benchmark.json": _json(result.to_dict())}, {"result": result.to_dict()}

    return workspace.make(steps.result, make)


def result_of(manifest: Manifest) -> BenchmarkResult:
    """The result that an artifact of a benchmark holds."""
    return BenchmarkResult.from_dict(manifest.facts["result"], f"benchmark/{manifest.key}")


def check(workspace: Workspace, progress: Progress = no_progress) -> None:
    """Raise the first error that a benchmark would meet, with its name."""
    for name, config in workspace.experiment.evaluation.benchmarks.items():
        where = f"evaluation.benchmarks.{name}"
        own = workspace.benchmark(name)
        try:
            asked = prompts.recipe(own)
            found = prompts.find(own, asked)
            usable_rows.check(own, asked, found, progress)
            if config.controls_length:
                alpaca_eval.check_length_data(config, found, f"{where}.length_controlled")
        except UnusableError as error:
            first, *rest = error.message.split("\n")
            raise UnusableError.of([f"{where}: {first}", *rest], error.found) from None
        except QRPOError as error:
            place = where if error.where is None else f"{where}, {error.where}"
            raise type(error)(error.message, where=place, remedy=error.remedy) from None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
