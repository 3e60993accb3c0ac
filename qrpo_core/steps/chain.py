"""The block steps of an experiment, put together: the order of things lives in flows/, what they are here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from qrpo_core.steps.blocks import BlockStep, LogprobStep, RewardStep, SampleStep
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.prompts import of_split
from qrpo_core.steps.workspace import Workspace


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


def training_steps(workspace: Workspace, prompts: pa.Table, policy: Policy) -> TrainingSteps:
    """The pre-computation: `sampling.references_per_prompt` samples of every training prompt."""
    count = workspace.experiment.sampling.references_per_prompt
    samples = SampleStep(workspace, policy, of_split(prompts, "train"), count, "sample references")
    return TrainingSteps(
        samples, RewardStep(samples, "score references"), LogprobStep(samples, policy, "reference log-probs")
    )


def held_out_steps(workspace: Workspace, prompts: pa.Table, policy: Policy, when: str) -> HeldOutSteps:
    """The same sampling and scoring on the held-out prompts; `when` is "before" or "after"."""
    count = workspace.experiment.evaluation.samples_per_prompt
    samples = SampleStep(workspace, policy, of_split(prompts, "held_out"), count, f"sample held-out, {when}")
    return HeldOutSteps(samples, RewardStep(samples, f"score held-out, {when}"))


def kl_steps(after: HeldOutSteps, trained: Policy, reference: Policy) -> KLSteps:
    """Both sides of the KL estimate."""
    return KLSteps(
        LogprobStep(after.samples, trained, "policy log-probs, after"),
        LogprobStep(after.samples, reference, "reference log-probs, after"),
    )
