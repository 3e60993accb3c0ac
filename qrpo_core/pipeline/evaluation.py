"""Evaluation: sample and score the held-out prompts under both policies, and compare the results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.config import cache_key_fields
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER, EvaluationInput
from qrpo_core.evaluation.metrics import evaluate_policies
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.pipeline import engine_copy, prompts
from qrpo_core.pipeline.benchmarks import BenchmarkSteps
from qrpo_core.pipeline.joined_rewards import joined_rewards
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_recipes import LogprobSettings
from qrpo_core.pipeline.row_steps import BlockStep, LogprobStep, RewardStep, SampleStep
from qrpo_core.pipeline.stage_names import (
    ANNOTATE_HELD_OUT,
    SAMPLE_HELD_OUT,
    SCORE_POLICY_LOGPROBS,
    SCORE_REFERENCE_LOGPROBS,
    of_judge,
)
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 3
REPORT_VERSION = 7


@dataclass(frozen=True)
class HeldOutSteps:
    """Completions of the held-out prompts by one policy, their rewards, and what each judge says of them."""

    samples: SampleStep
    rewards: RewardStep
    judges: Mapping[str, RewardStep]

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.samples, self.rewards, *self.judges.values()))


@dataclass(frozen=True)
class KLSteps:
    """Log-probs of the trained policy's held-out completions, under it and under the reference."""

    policy: LogprobStep
    reference: LogprobStep

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.policy, self.reference))


def held_out_steps(workspace: Workspace, table: pa.Table, policy: Policy, when: str) -> HeldOutSteps:
    """Sampling and scoring of the held-out prompts of `table`. when : "before" or "after" training."""
    count = workspace.experiment.evaluation.samples_per_prompt
    samples = SampleStep(
        workspace, policy, prompts.of_split(table, "held_out"), count, f"{SAMPLE_HELD_OUT}, {when}"
    )
    judges = {
        name: RewardStep(samples, of_judge(name, when), scorer)
        for name, scorer in workspace.experiment.evaluation.judges.items()
    }
    return HeldOutSteps(samples, RewardStep(samples, f"{ANNOTATE_HELD_OUT}, {when}"), judges)


def kl_steps(after: HeldOutSteps, trained: Policy, reference: Policy) -> KLSteps:
    """Both sides of the KL estimate."""
    settings = LogprobSettings.of_kl(after.samples.workspace.experiment)
    return KLSteps(
        LogprobStep(after.samples, trained, f"{SCORE_POLICY_LOGPROBS}, after", settings=settings),
        LogprobStep(after.samples, reference, f"{SCORE_REFERENCE_LOGPROBS}, after", settings=settings),
    )


def recipe(
    workspace: Workspace,
    inputs: Mapping[str, Recipe],
    retryable: Mapping[str, str] | None = None,
    left_out: str = "",
) -> Recipe:
    """Decided by the prompts, both policies' rewards, and the log-probs of the trained policy's samples.

    retryable : by input, a digest of the rows with a retryable status. left_out : names the held-out
    prompts that are left out.
    """
    keys = {name: each.key for name, each in inputs.items()}
    config = cache_key_fields(workspace.experiment.evaluation)
    if found := {name: digest for name, digest in (retryable or {}).items() if digest}:
        config["retryable"] = found
    if left_out:
        config["left_out"] = left_out
    return Recipe("evaluate", VERSION, config, keys)


def report_recipe(
    workspace: Workspace, evaluation: Recipe, train: Recipe, benchmarks: Sequence[BenchmarkSteps] = ()
) -> Recipe:
    """Decided by what it shows; the experiment's name stands in the title."""
    inputs = {"evaluate": evaluation.key, "train": train.key}
    inputs |= {f"benchmark {each.name}": each.result.key for each in benchmarks}
    experiment = workspace.experiment
    config = {"name": experiment.name, "truncated_warning": experiment.training_data.truncated_warning}
    return Recipe("report", REPORT_VERSION, config, inputs)


@dataclass(frozen=True)
class EvaluationSteps:
    """The evaluation of a round's policy: its rows and the recipes of its artifacts."""

    round: Round
    before: HeldOutSteps
    after: HeldOutSteps
    divergence: KLSteps
    evaluate: Recipe
    report: Recipe
    benchmarks: tuple[BenchmarkSteps, ...] = ()


def evaluation_steps(
    before: HeldOutSteps,
    round_: Round,
    trained: Policy,
    left_out: str,
    benchmarks: Sequence[BenchmarkSteps] = (),
) -> EvaluationSteps:
    """The evaluation of `trained`. left_out : names the held-out prompts that are left out."""
    workspace = round_.workspace
    after = held_out_steps(workspace, before.samples.prompts, trained, "after")
    divergence = kl_steps(after, trained, round_.reference)
    rewards = {"rewards_before": before.rewards, "rewards_after": after.rewards}
    for name in before.judges:
        rewards |= {f"judge {name}, before": before.judges[name], f"judge {name}, after": after.judges[name]}
    inputs = {name: step.recipe for name, step in rewards.items()} | {
        "prompts": round_.prompts_recipe,
        "policy_logprobs": divergence.policy.recipe,
        "ref_logprobs": divergence.reference.recipe,
    }
    retryable = {name: step.retryable_digest for name, step in rewards.items()}
    evaluate = recipe(workspace, inputs, retryable, left_out)
    report = report_recipe(workspace, evaluate, round_.train_recipe, benchmarks)
    return EvaluationSteps(round_, before, after, divergence, evaluate, report, tuple(benchmarks))


def build(workspace: Workspace, steps: EvaluationSteps) -> Manifest:
    """Commit `evaluation.json` and the rows it is computed from: `before.parquet` and `after.parquet`."""

    def make(scratch: Path) -> Built:
        sampling = workspace.experiment.sampling
        rows_after = joined_rewards(steps.after.rewards)
        for name, step in (
            ("policy_logprob", steps.divergence.policy),
            ("ref_logprob", steps.divergence.reference),
        ):
            logprobs = workspace.blocks.read(step.recipe, step.wanted, LOGPROBS)
            rows_after = rows_after.append_column(name, logprobs["logprob"])
        rows_before = joined_rewards(steps.before.rewards)
        data = EvaluationInput(rows_before, rows_after, sampling.temperature, sampling.top_p)
        judged = {
            name: tuple(joined_rewards(side.judges[name]) for side in (steps.before, steps.after))
            for name in workspace.experiment.evaluation.judges
        }
        result = evaluate_policies(data, workspace.experiment.evaluation, judged)
        files: dict[str, Path | bytes] = {
            "evaluation.json": json.dumps(result.to_dict()).encode(),
            "before.parquet": as_parquet(data.before, EVALUATED, "evaluation, before"),
            "after.parquet": as_parquet(data.after, EVALUATED_AFTER, "evaluation, after"),
        }
        facts = {
            "result": result.to_dict(),
            "drawn": _drawn(steps),
            "policy": steps.divergence.policy.recipe.inputs["policy"],
        }
        return files, facts | workspace.settings_facts

    return workspace.make(steps.evaluate, make)


def _drawn(steps: EvaluationSteps) -> dict[str, Any] | None:
    """Facts of what the trained policy's samples were drawn from; measured now if they never were."""
    copied = engine_copy.engine_copy_of(steps.after.samples)
    return None if copied is None else copied.build().facts


def result_of(manifest: Manifest) -> EvaluationResult:
    """The evaluation that an artifact holds."""
    return EvaluationResult.from_dict(manifest.facts["result"], f"evaluate/{manifest.key}")
