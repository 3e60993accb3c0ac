"""The steps of an experiment, each with the recipe that names its result; `stage_names` has their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.pipeline import policies, prompts, usable_rows
from qrpo_core.pipeline.benchmarks import Benchmark, benchmark_steps, benchmarks
from qrpo_core.pipeline.evaluation import EvaluationSteps, HeldOutSteps, evaluation_steps, held_out_steps
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.pipeline.rounds import Round, first_round, next_round
from qrpo_core.pipeline.row_recipes import reward_recipe, sample_recipe
from qrpo_core.pipeline.row_steps import RewardStep, SampleStep
from qrpo_core.pipeline.usable_rows import UsableTables
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class ExperimentSteps:
    """The steps of an experiment, known as soon as its reference policy and its prompts are.

    tables : the usable prompts and the rows that are left out. usable_recipe : names the check of the rows.
    first : the first round of training. before : the evaluation of the reference policy.
    part : the held-out prompts that are evaluated; None for all.
    """

    workspace: Workspace
    reference: Policy
    tables: UsableTables
    prompts_recipe: Recipe
    usable_recipe: Recipe
    first: Round
    before: HeldOutSteps
    part: HeldOutPart | None = None

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        reference: Policy,
        prompts_recipe: Recipe,
        tables: PromptTables | UsableTables,
    ) -> ExperimentSteps:
        """The steps on these prompts. tables : PromptTables mean that every row is usable."""
        if isinstance(tables, PromptTables):
            tables = UsableTables(tables.prompts, tables.offline)
        return cls(
            workspace,
            reference,
            tables,
            prompts_recipe,
            usable_rows.recipe(workspace, prompts_recipe, reference),
            first_round(workspace, reference, prompts_recipe, tables),
            held_out_steps(workspace, tables.prompts, reference, "before"),
        )

    def on_part(self, part: HeldOutPart | None) -> ExperimentSteps:
        """The same steps, with only a part of the held-out prompts evaluated. part : None for all of them."""
        if part is None:
            return self
        held_out = prompts.of_split(self.prompts, "held_out")
        inside = held_out.filter(pa.array(part.mask(held_out["prompt_id"].to_pylist()), pa.bool_()))
        before = held_out_steps(self.workspace, inside, self.reference, "before")
        return replace(self, before=before, part=part)

    @property
    def prompts(self) -> pa.Table:
        """The usable prompts, PROMPTS rows."""
        return self.tables.prompts

    @property
    def reward_problems(self) -> Sequence[Mapping[str, Any]]:
        """Why scorers are not to be trusted, as the check of the rows remembers it."""
        checked = self.workspace.artifacts.find(self.usable_recipe)
        return [] if checked is None else checked.facts["doubts"]

    def after_round(self, round_: Round) -> Round | None:
        """The next round, once the policy of this one is in the store; None after the last."""
        if round_.number == self.workspace.experiment.rounds.count:
            return None
        return next_round(round_, self.prompts_recipe, trained_policy(round_))

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
            if self.workspace.artifacts.find(round_.train_recipe) is None:
                return

    def last(self) -> Round:
        """The round whose policy is the result; MissingError while one before it is not trained."""
        return self.round(self.workspace.experiment.rounds.count)

    @cached_property
    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks of the evaluation, with the reference policy."""
        return benchmarks(self.workspace, self.reference)

    def after(self, round_: Round) -> EvaluationSteps:
        """The evaluation of a round's policy; MissingError until the policy is trained."""
        trained = trained_policy(round_)
        found = [
            benchmark_steps(self.workspace, each, trained, self.prompts_recipe, self.prompts)
            for each in self.benchmarks
        ]
        left_out = self.tables.left_out.digest("held_out")
        if self.part is not None:
            left_out = f"{left_out}, {self.part}"
        return evaluation_steps(self.before, round_, trained, left_out, found)


def trained_policy(round_: Round) -> Policy:
    """The policy that a round made; MissingError if it has not yet."""
    manifest = round_.workspace.artifacts.get(round_.train_recipe)
    return policies.stored(round_.workspace, manifest, round_.start)


def stored_steps(workspace: Workspace) -> ExperimentSteps:
    """The steps on the prompts in the store; MissingError where the model or the prompts are missing."""
    reference = stored_reference(workspace)
    recipe = prompts.recipe(workspace)
    tables = prompts.stored(workspace, workspace.artifacts.get(recipe))
    usable = usable_rows.usable(workspace, recipe, tables, reference)
    return ExperimentSteps.of(workspace, reference, recipe, usable)


def stored_reference(workspace: Workspace) -> Policy:
    """The reference policy; MissingError while it is to be converted."""
    reference = policies.reference(workspace, policies.source_of(workspace))
    if reference is None:
        raise MissingError(
            "the model is not converted yet", where=workspace.objects.url, remedy="run precompute first"
        )
    return reference


def budget_recipes(workspace: Workspace) -> tuple[Recipe, Recipe]:
    """The recipes of the references and of their rewards.

    A budget is stored under these two recipes. This does not read it.
    """
    reference = stored_reference(workspace)
    prompts.settle_day(workspace, workspace.artifacts.find(prompts.recipe(workspace)))
    samples = sample_recipe(workspace, reference)
    return samples, reward_recipe(workspace, samples)


def reference_steps(workspace: Workspace) -> tuple[SampleStep, RewardStep]:
    """The steps that draw and score the references; ConfigError where the experiment ranks nothing."""
    first = stored_steps(workspace).first
    rewards = first.references
    if isinstance(rewards, RewardStep) and isinstance(rewards.completions, SampleStep):
        return rewards.completions, rewards
    raise ConfigError(
        "this experiment draws no references",
        where=f"training_data.mode {workspace.experiment.training_data.mode!r}",
        remedy="a budget is for experiments that rank completions among sampled references",
    )
