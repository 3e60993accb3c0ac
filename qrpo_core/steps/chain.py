"""An experiment's steps put together: what they are and what names them. Their order lives in flows/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from qrpo_core.errors import ConfigError, MissingError
from qrpo_core.steps import evaluation, policies, prompts, usable
from qrpo_core.steps.blocks import (
    BlockStep,
    LogprobStep,
    RewardStep,
    SampleStep,
    Scoring,
    reward_recipe,
    sample_recipe,
)
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.prompts import PromptTables
from qrpo_core.steps.rounds import Round, first_round, next_round
from qrpo_core.steps.usable import UsableTables
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.recipe import Recipe


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
    """The same sampling and scoring on the held-out prompts; `when` is "before" or "after"."""
    count = workspace.experiment.evaluation.samples_per_prompt
    samples = SampleStep(
        workspace, policy, prompts.of_split(table, "held_out"), count, f"sample held-out, {when}"
    )
    judges = {
        name: RewardStep(samples, f"judge {name} held-out, {when}", scorer)
        for name, scorer in workspace.experiment.evaluation.judges.items()
    }
    return HeldOutSteps(samples, RewardStep(samples, f"score held-out, {when}"), judges)


def kl_steps(after: HeldOutSteps, trained: Policy, reference: Policy) -> KLSteps:
    """Both sides of the KL estimate."""
    scoring = Scoring.of_kl(after.samples.workspace.experiment)
    return KLSteps(
        LogprobStep(after.samples, trained, "policy log-probs, after", scoring=scoring),
        LogprobStep(after.samples, reference, "reference log-probs, after", scoring=scoring),
    )


@dataclass(frozen=True)
class Chain:
    """All that is known of an experiment once its reference policy and its prompts are.

    found : the prompts that are used, and what is left out of them. usable : the recipe of what says so.
    """

    workspace: Workspace
    reference: Policy
    found: UsableTables
    prompts: Recipe
    usable: Recipe
    first: Round
    before: HeldOutSteps

    @property
    def table(self) -> pa.Table:
        """The prompts that are used, PROMPTS rows."""
        return self.found.prompts

    @property
    def doubts(self) -> Sequence[Mapping[str, Any]]:
        """Why scorers are not to be trusted, as the check of the rows remembers it (`steps.trusted`)."""
        checked = self.workspace.artifacts.find(self.usable)
        return [] if checked is None else checked.facts["doubts"]

    def after_round(self, round_: Round) -> Round | None:
        """The next round, once the policy of this one is in the store; None after the last."""
        if round_.number == self.workspace.experiment.rounds.count:
            return None
        return next_round(round_, self.prompts, trained_policy(round_))

    def rounds(self) -> Iterator[Round]:
        """Every round; one more than the store has policies for raises MissingError."""
        here: Round | None = self.first
        while here is not None:
            yield here
            here = self.after_round(here)

    def round(self, number: int) -> Round:
        """A round by its number; MissingError while one before it is not trained."""
        return next(islice(self.rounds(), number - 1, None))

    def planned_rounds(self) -> Iterator[Round]:
        """The rounds that are known by now: those made, and the first that is not."""
        for round_ in self.rounds():
            yield round_
            if self.workspace.artifacts.find(round_.train) is None:
                return

    def last(self) -> Round:
        """The round whose policy is the result; MissingError while one before it is not trained."""
        return self.round(self.workspace.experiment.rounds.count)

    def after(self, round_: Round) -> EvaluationChain:
        """What follows once the policy of a round is in the store."""
        trained = trained_policy(round_)
        after = held_out_steps(self.workspace, self.table, trained, "after")
        divergence = kl_steps(after, trained, self.reference)
        inputs = {
            "prompts": self.prompts,
            "rewards_before": self.before.rewards.recipe,
            "rewards_after": after.rewards.recipe,
            "policy_logprobs": divergence.policy.recipe,
            "ref_logprobs": divergence.reference.recipe,
        }
        for name, step in self.before.judges.items():
            inputs[f"judge {name}, before"] = step.recipe
            inputs[f"judge {name}, after"] = after.judges[name].recipe
        unsettled = {"before": self.before.rewards.unsettled, "after": after.rewards.unsettled}
        for name, step in self.before.judges.items():
            unsettled |= {f"{name}, before": step.unsettled, f"{name}, after": after.judges[name].unsettled}
        left_out = self.found.left_out.digest("held_out")
        evaluate = evaluation.recipe(self.workspace, inputs, unsettled, left_out)
        report = evaluation.report_recipe(self.workspace, evaluate, round_.train)
        return EvaluationChain(round_, after, divergence, evaluate, report)


@dataclass(frozen=True)
class EvaluationChain:
    """The steps and recipes that need the trained policy of a round."""

    round: Round
    after: HeldOutSteps
    divergence: KLSteps
    evaluate: Recipe
    report: Recipe


def trained_policy(round_: Round) -> Policy:
    """The policy that a round made; MissingError if it has not yet."""
    manifest = round_.workspace.artifacts.get(round_.train)
    return policies.stored(round_.workspace, manifest, round_.start)


def chain(
    workspace: Workspace, reference: Policy, asked: Recipe, found: PromptTables | UsableTables
) -> Chain:
    """Put the steps together. asked : the prompts' recipe. found : what of them is used, or all."""
    if isinstance(found, PromptTables):
        found = UsableTables(found.prompts, found.offline)
    return Chain(
        workspace,
        reference,
        found,
        asked,
        usable.recipe(workspace, asked, reference),
        first_round(workspace, reference, asked, found),
        held_out_steps(workspace, found.prompts, reference, "before"),
    )


def stored_chain(workspace: Workspace) -> Chain:
    """The chain of what the store has; MissingError if the model or the prompts are not there yet."""
    reference = stored_reference(workspace)
    asked = prompts.recipe(workspace)
    manifest = workspace.artifacts.get(asked)
    tables = prompts.stored(workspace, manifest)
    return chain(workspace, reference, asked, usable.usable(workspace, asked, tables, reference))


def stored_reference(workspace: Workspace) -> Policy:
    """The reference policy; MissingError while it is to be converted."""
    reference = policies.reference(workspace, policies.source_of(workspace))
    if reference is None:
        raise MissingError(
            "the model is not converted yet", where=workspace.objects.url, remedy="run precompute first"
        )
    return reference


def budget_recipes(workspace: Workspace) -> tuple[Recipe, Recipe]:
    """The recipes of references and of their rewards, by which a budget is named; it is not read for that."""
    reference = stored_reference(workspace)
    prompts.settle_day(workspace, workspace.artifacts.find(prompts.recipe(workspace)))
    samples = sample_recipe(workspace, reference)
    return samples, reward_recipe(workspace, samples)


def reference_steps(workspace: Workspace) -> tuple[SampleStep, RewardStep]:
    """The steps that draw and score the references; ConfigError where the experiment ranks nothing."""
    first = stored_chain(workspace).first
    rewards = first.references
    if isinstance(rewards, RewardStep) and isinstance(rewards.completions, SampleStep):
        return rewards.completions, rewards
    raise ConfigError(
        "this experiment draws no references",
        where=f"training_data.mode {workspace.experiment.training_data.mode!r}",
        remedy="a budget is for experiments that rank completions among sampled references",
    )
