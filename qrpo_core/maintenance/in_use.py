"""Which recipes of a store an experiment uses: its own, and everything that they are made from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.common.hashing import canonical_json
from qrpo_core.config import Experiment
from qrpo_core.pipeline import engine_copy, evaluation, parity, policies, pool_report, prompts, usable_rows
from qrpo_core.pipeline.comparison import STEP as COMPARED
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_recipes import drawn_from
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.training import checkpoint_recipe
from qrpo_core.pipeline.usable_rows import UsableTables
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.checkpoint_store import FOLDER, stored_trainings
from qrpo_core.store.recipe import Recipe

#: Fields of a recipe's config that count the rows of a table, or name its missing rows.
_BUDGET = {
    "quantiles": ("rows", "references", "left_out", "retryable", "retryable_references"),
    "evaluate": ("left_out", "retryable"),
    "pool_report": ("rows", "left_out", "retryable"),
    "benchmark": ("left_out", "retryable"),
}


@dataclass(frozen=True)
class StoredRecipe:
    """One recipe with stored objects.

    recipe : its `to_dict`. policy : digest of the policy that the artifact holds, if it holds one.
    """

    step: str
    key: str
    recipe: dict[str, Any]
    policy: str | None = None

    @property
    def inputs(self) -> frozenset[str]:
        """The keys and digests of its inputs, as its recipe names them."""
        return frozenset(self.recipe["inputs"].values())

    def compares_with(self, names: Collection[str]) -> bool:
        """Whether it compares policies with the reference policy whose held-out rewards are among `names`."""
        return self.recipe["inputs"].get("rewards_before") in names

    @property
    def kind(self) -> str:
        """Everything that decides the result but its inputs and its number of rows."""
        return _kind(self.recipe)


def stored_recipes(workspace: Workspace) -> list[StoredRecipe]:
    """Every recipe with an artifact, blocks or checkpoints (whose step is FOLDER) in the store."""
    found = [
        StoredRecipe(manifest.step, manifest.key, manifest.recipe, policies.digest_of(manifest.files))
        for manifest in workspace.artifacts.manifests()
    ]
    found += [StoredRecipe(each.step, each.key, each.to_dict()) for each in workspace.blocks.all_recipes()]
    found += [StoredRecipe(FOLDER, each.key, each.to_dict()) for each in stored_trainings(workspace.objects)]
    return found


def finished_trainings(stored: Iterable[StoredRecipe]) -> set[str]:
    """The keys of the checkpoints that no training needs: their policy is committed."""
    done = (Recipe.from_dict(each.recipe) for each in stored if each.step == "train")
    return {checkpoint_recipe(each).key for each in done}


def quarantined_policies(workspace: Workspace) -> Iterator[StoredRecipe]:
    """Quarantined models and trained policies.

    Until they are made again, only their quarantined manifests name the policy that samples were drawn from.
    `policy` is None if the manifest itself is unreadable.
    """
    for each in workspace.blocks.quarantined():
        if each.step not in ("model", "train"):
            continue
        manifest = json.loads(workspace.objects.read(each.path))["manifest"]
        try:
            yield StoredRecipe(each.step, each.key, manifest["recipe"], policies.digest_of(manifest["files"]))
        except (TypeError, KeyError, AttributeError):
            yield StoredRecipe(each.step, each.key, Recipe(each.step, version=0).to_dict())


@dataclass(frozen=True)
class UsedRecipes:
    """Keys of recipes.

    now : recipes that a run of the experiment as it is looks up. kept : these, the same at any budget and in
    any round, and everything that they are made from.
    """

    now: frozenset[str]
    kept: frozenset[str]


def used_recipes(workspace: Workspace, stored: Iterable[StoredRecipe]) -> UsedRecipes:
    """The stored recipes that an experiment uses. Reads its prompts; MissingError without its model.

    A stored recipe belongs to the experiment, at another budget or in a later round, if its settings and all
    its inputs are the experiment's. A comparison on its pool belongs to it, with every policy compared.
    """
    stored = list(stored)
    known = known_steps(workspace)
    recipes = list(_recipes(known))
    now = frozenset(recipe.key for recipe in recipes)
    kinds = {_kind(recipe.to_dict()) for recipe in (*recipes, *_evaluation(workspace, known))}
    experiment = workspace.experiment
    names = set(now) | _policy_names(experiment, known.reference.digest)
    compared = {each.key for each in stored if each.step == COMPARED and each.compares_with(now)}
    names |= with_inputs(compared, stored)
    grown = True
    while grown:
        grown = False
        for each in stored:
            if each.key not in names and each.kind in kinds and each.inputs <= names:
                names.add(each.key)
                grown = True
            if each.key in names and each.policy is not None and each.policy not in names:
                names |= _policy_names(experiment, each.policy)
                grown = True
    return UsedRecipes(now, frozenset(with_inputs(names, stored)))


def with_inputs(names: Iterable[str], stored: Iterable[StoredRecipe]) -> set[str]:
    """`names` and the keys of all stored recipes that they are made from, directly or indirectly."""
    provider: dict[str, list[StoredRecipe]] = {}
    for each in stored:
        for name in (each.key, each.policy):
            if name is not None:
                provider.setdefault(name, []).append(each)
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().rpartition(":")[2]  # the policy's digest, without what `drawn_from` adds
        if name in found:
            continue
        found.add(name)
        for each in provider.get(name, ()):
            left += [each.key, *each.inputs]
    return found


def known_prompts(workspace: Workspace) -> tuple[Recipe, UsableTables]:
    """The prompts' recipe and the usable rows of their tables, from the store or else from their source."""
    asked = prompts.recipe(workspace)
    reference = policies.reference(workspace, policies.source_of(workspace))
    return asked, usable_rows.usable(workspace, asked, prompts.find(workspace, asked), reference)


def steps_of(workspace: Workspace, asked: Recipe, tables: UsableTables | PromptTables) -> ExperimentSteps:
    """The steps on these prompts; its steps raise MissingError until the reference policy is converted."""
    reference = policies.reference(workspace, policies.source_of(workspace))
    reference = reference or Policy("not converted yet", _not_converted)
    return ExperimentSteps.of(workspace, reference, asked, tables)


def known_steps(workspace: Workspace) -> ExperimentSteps:
    """The steps of the experiment as far as its recipes are known."""
    return steps_of(workspace, *known_prompts(workspace))


def _not_converted() -> Path:
    raise MissingError("the model is not converted yet", remedy="run precompute first")


def _recipes(known: ExperimentSteps) -> Iterator[Recipe]:
    """Every recipe of the experiment that is known by now."""
    source = policies.source_of(known.workspace)
    if source.needs_conversion:
        yield policies.recipe(known.workspace, source)
    yield from (known.prompts_recipe, known.usable_recipe)
    rounds = list(known.planned_rounds())
    for round_ in rounds:
        yield from _of_round(round_)
    yield from _steps(known.before)
    yield from _of_pool(known)
    for each in known.benchmarks:
        yield from (each.prompts_recipe, each.usable_recipe)
        yield from _steps(each.before)
    last = rounds[-1]
    whole = last.number == known.workspace.experiment.rounds.count
    if whole and known.workspace.artifacts.find(last.train_recipe) is not None:
        end = known.after(last)
        yield from _steps((*end.after, *end.divergence))
        yield from (end.evaluate, end.report)
        for tested in end.benchmarks:
            yield from _steps(tested.after)
            yield tested.result


def _of_round(round_: Round) -> Iterator[Recipe]:
    yield from _steps(round_.row_steps)
    for rewards in (round_.rewards, round_.references, round_.own):
        if rewards is not None:
            yield from (rewards.recipe, rewards.completions.recipe, rewards.completions.texts)
    yield from (
        round_.quantiles_recipe,
        *(step.recipe for step in round_.logprob_steps),
        round_.training_set_recipe,
        round_.train_recipe,
        checkpoint_recipe(round_.train_recipe),
    )


def _of_pool(known: ExperimentSteps) -> Iterator[Recipe]:
    """The pool report and its judges; none where it cannot be made."""
    with suppress(QRPOError):
        steps = pool_report.pool_steps(known)
        yield from steps.judge_recipes.values()
        yield steps.recipe


def _evaluation(workspace: Workspace, known: ExperimentSteps) -> tuple[Recipe, Recipe]:
    """The recipes of the evaluation and of the report; only their settings count."""
    evaluate = evaluation.recipe(workspace, {})
    return evaluate, evaluation.report_recipe(workspace, evaluate, known.first.train_recipe)


def _kind(recipe: dict[str, Any]) -> str:
    budget = _BUDGET.get(recipe["step"], ())
    config = {name: value for name, value in recipe["config"].items() if name not in budget}
    return canonical_json([recipe["step"], recipe["version"], config, sorted(recipe["inputs"])])


def _policy_names(experiment: Experiment, policy: str) -> set[str]:
    """The names of a policy in an experiment's recipes: see `pipeline.row_recipes.drawn_from`."""
    return {policy, drawn_from(experiment, policy)}


def _steps(steps: Iterable[BlockStep]) -> Iterator[Recipe]:
    """The recipes of steps, and of the comparisons with the training model before them."""
    for step in steps:
        for asked in (engine_copy.engine_copy_of(step), parity.parity_check(step)):
            if asked is not None:
                yield asked.recipe
        yield step.recipe
