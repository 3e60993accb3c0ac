"""An experiment's steps put together: what they are and what names them. Their order lives in flows/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from qrpo_core.errors import MissingError
from qrpo_core.records import PROMPTS
from qrpo_core.steps import evaluation, policies, prompts, quantiles, training, training_set
from qrpo_core.steps.blocks import BlockStep, LogprobStep, RewardStep, SampleStep
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.tables import load
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class TrainingSteps:
    """Reference completions of the training prompts, their rewards and their log-probs."""

    samples: SampleStep
    rewards: RewardStep
    logprobs: LogprobStep

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.samples, self.rewards, self.logprobs))


@dataclass(frozen=True)
class HeldOutSteps:
    """Completions of the held-out prompts by one policy, and their rewards."""

    samples: SampleStep
    rewards: RewardStep

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.samples, self.rewards))


@dataclass(frozen=True)
class KLSteps:
    """Log-probs of the trained policy's held-out completions, under it and under the reference."""

    policy: LogprobStep
    reference: LogprobStep

    def __iter__(self) -> Iterator[BlockStep]:
        return iter((self.policy, self.reference))


def training_steps(workspace: Workspace, table: pa.Table, policy: Policy) -> TrainingSteps:
    """The pre-computation: `sampling.references_per_prompt` samples of every training prompt."""
    count = workspace.experiment.sampling.references_per_prompt
    samples = SampleStep(workspace, policy, prompts.of_split(table, "train"), count, "sample references")
    return TrainingSteps(
        samples, RewardStep(samples, "score references"), LogprobStep(samples, policy, "reference log-probs")
    )


def held_out_steps(workspace: Workspace, table: pa.Table, policy: Policy, when: str) -> HeldOutSteps:
    """The same sampling and scoring on the held-out prompts; `when` is "before" or "after"."""
    count = workspace.experiment.evaluation.samples_per_prompt
    samples = SampleStep(
        workspace, policy, prompts.of_split(table, "held_out"), count, f"sample held-out, {when}"
    )
    return HeldOutSteps(samples, RewardStep(samples, f"score held-out, {when}"))


def kl_steps(after: HeldOutSteps, trained: Policy, reference: Policy) -> KLSteps:
    """Both sides of the KL estimate."""
    return KLSteps(
        LogprobStep(after.samples, trained, "policy log-probs, after"),
        LogprobStep(after.samples, reference, "reference log-probs, after"),
    )


@dataclass(frozen=True)
class Chain:
    """All that is known of an experiment once its reference policy and its prompts are."""

    workspace: Workspace
    reference: Policy
    table: pa.Table
    prompts: Recipe
    training: TrainingSteps
    before: HeldOutSteps
    quantiles: Recipe
    training_set: Recipe
    train: Recipe

    def after(self, trained: Policy) -> EvaluationChain:
        """What follows once there is a trained policy."""
        after = held_out_steps(self.workspace, self.table, trained, "after")
        divergence = kl_steps(after, trained, self.reference)
        inputs = {
            "prompts": self.prompts,
            "rewards_before": self.before.rewards.recipe,
            "rewards_after": after.rewards.recipe,
            "policy_logprobs": divergence.policy.recipe,
            "ref_logprobs": divergence.reference.recipe,
        }
        evaluate = evaluation.recipe(self.workspace, inputs)
        report = evaluation.report_recipe(self.workspace, evaluate, self.train)
        return EvaluationChain(after, divergence, evaluate, report)


@dataclass(frozen=True)
class EvaluationChain:
    """The steps and recipes that need the trained policy."""

    after: HeldOutSteps
    divergence: KLSteps
    evaluate: Recipe
    report: Recipe


def chain(workspace: Workspace, reference: Policy, asked: Recipe, table: pa.Table) -> Chain:
    """Put the steps together. asked : the prompts' recipe. table : PROMPTS rows."""
    steps = training_steps(workspace, table, reference)
    ranked = quantiles.recipe(asked, steps.rewards)
    assembled = training_set.recipe(ranked, steps.logprobs)
    return Chain(
        workspace,
        reference,
        table,
        asked,
        steps,
        held_out_steps(workspace, table, reference, "before"),
        ranked,
        assembled,
        training.recipe(workspace, assembled, reference),
    )


def stored_chain(workspace: Workspace) -> Chain:
    """The chain of what the store has; MissingError if the model or the prompts are not there yet."""
    source = policies.source_of(workspace)
    reference = policies.reference(workspace, source)
    if reference is None:
        raise MissingError(
            "the model is not converted yet", where=workspace.objects.url, remedy="run precompute first"
        )
    asked = prompts.recipe(workspace)
    manifest = workspace.artifacts.get(asked)
    return chain(workspace, reference, asked, load(workspace, manifest, "prompts.parquet", PROMPTS))
