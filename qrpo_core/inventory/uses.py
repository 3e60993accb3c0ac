"""What an experiment uses of a store: the results that its recipes name, and all that those refer to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qrpo_core.config import Experiment
from qrpo_core.errors import MissingError
from qrpo_core.ids import canonical_json, digest_json
from qrpo_core.policy import POLICY_FILES
from qrpo_core.steps import drawn, evaluation, parity, policies, prompts, usable
from qrpo_core.steps.blocks import BlockStep, drawn_from
from qrpo_core.steps.chain import Chain, chain
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.prompts import PromptTables
from qrpo_core.steps.rounds import Round
from qrpo_core.steps.usable import UsableTables
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

#: Fields of a recipe's config that say how many rows a table holds, or which of them are lacking.
_BUDGET = {
    "quantiles": ("rows", "references", "left_out", "unsettled", "unsettled_references"),
    "evaluate": ("left_out", "unsettled"),
}


@dataclass(frozen=True)
class Stored:
    """One recipe that the store holds something of.

    recipe : its `to_dict`. policy : digest of the policy that an artifact is, if it is one.
    """

    step: str
    key: str
    recipe: dict[str, Any]
    policy: str | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Keys and digests that it is made from, as its recipe spells them."""
        return frozenset(self.recipe["inputs"].values())

    @property
    def kind(self) -> str:
        """What decides it besides its inputs and its number of rows."""
        return _kind(self.recipe)


def stored_recipes(workspace: Workspace) -> list[Stored]:
    """Every recipe that the store holds an artifact or blocks of."""
    found = [
        Stored(manifest.step, manifest.key, manifest.recipe, policy_of(manifest))
        for manifest in workspace.artifacts.manifests()
    ]
    found += [Stored(each.step, each.key, each.to_dict()) for each in workspace.blocks.all_recipes()]
    return found


def set_aside_policies(workspace: Workspace) -> Iterator[Stored]:
    """Models and trained policies that were set aside as damaged.

    Until they are made again, this is where it stands which samples were drawn from them. Where the damage
    was in the manifest itself, `policy` is None: nobody knows then.
    """
    for each in workspace.blocks.aside():
        if each.step not in ("model", "train"):
            continue
        manifest = json.loads(workspace.objects.read(each.path))["manifest"]
        try:
            yield Stored(each.step, each.key, manifest["recipe"], _policy_of_files(manifest["files"]))
        except (TypeError, KeyError, AttributeError):
            yield Stored(each.step, each.key, Recipe(each.step, version=0).to_dict())


def policy_of(manifest: Manifest) -> str | None:
    """The digest of the policy that a model or train artifact holds, from its manifest alone.

    The same as `policies.stored(...).digest`, for which the files of a remote store are fetched.
    """
    return _policy_of_files(manifest.files)


def _policy_of_files(files: dict[str, dict[str, Any]]) -> str | None:
    """See `policy.policy_digest`. files : as in a manifest."""
    names = {name: Path(name).name for name in files if Path(name).parent == Path("policy")}
    digests = {
        base: files[name]["digest"]
        for name, base in names.items()
        if any(fnmatch(base, pattern) for pattern in POLICY_FILES)
    }
    return digest_json(digests) if digests else None


@dataclass(frozen=True)
class Uses:
    """Keys of recipes.

    now : what a run of the experiment as it stands would look for. kept : that, the same at any budget and
    in any round, and everything that these are made from.
    """

    now: frozenset[str]
    kept: frozenset[str]


def uses(workspace: Workspace, stored: Iterable[Stored]) -> Uses:
    """What an experiment uses of what is stored. Reads its prompts; MissingError if the model is not there.

    Beyond the recipes of the experiment as it stands, a stored recipe is its own at another budget, or of a
    later round, if its settings are the experiment's and everything it is made from is the experiment's.
    """
    stored = list(stored)
    known = known_chain(workspace)
    recipes = list(_recipes(known))
    now = frozenset(recipe.key for recipe in recipes)
    kinds = {_kind(recipe.to_dict()) for recipe in (*recipes, *_evaluation(workspace, known))}
    experiment = workspace.experiment
    names = set(now) | _spellings(experiment, known.reference.digest)
    grown = True
    while grown:
        grown = False
        for each in stored:
            if each.key not in names and each.kind in kinds and each.needs <= names:
                names.add(each.key)
                grown = True
            if each.key in names and each.policy is not None and each.policy not in names:
                names |= _spellings(experiment, each.policy)
                grown = True
    return Uses(now, frozenset(needed(names, stored)))


def needed(names: Iterable[str], stored: Iterable[Stored]) -> set[str]:
    """`names` and the keys of everything stored that they are made from, at any distance."""
    provider: dict[str, list[Stored]] = {}
    for each in stored:
        for name in (each.key, each.policy):
            if name is not None:
                provider.setdefault(name, []).append(each)
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().rpartition(":")[2]  # a policy's own name, without what `drawn_from` adds
        if name in found:
            continue
        found.add(name)
        for each in provider.get(name, ()):
            left += [each.key, *each.needs]
    return found


def known_prompts(workspace: Workspace) -> tuple[Recipe, UsableTables]:
    """The prompts' recipe, and what of their tables is used: from the store, or else from their source."""
    asked = prompts.recipe(workspace)
    reference = policies.reference(workspace, policies.source_of(workspace))
    return asked, usable.usable(workspace, asked, prompts.find(workspace, asked), reference)


def chain_of(workspace: Workspace, asked: Recipe, tables: UsableTables | PromptTables) -> Chain:
    """The chain on these prompts; MissingError while the reference policy is still to be converted."""
    reference = policies.reference(workspace, policies.source_of(workspace))
    return chain(workspace, reference or Policy("not converted yet", _not_there), asked, tables)


def known_chain(workspace: Workspace) -> Chain:
    """The chain of what is known by now, whatever the store has of it."""
    return chain_of(workspace, *known_prompts(workspace))


def _not_there() -> Path:
    raise MissingError("the model is not converted yet", remedy="run precompute first")


def _recipes(known: Chain) -> Iterator[Recipe]:
    """Every recipe of the experiment as it stands that is known by now."""
    source = policies.source_of(known.workspace)
    if source.needs_materialising:
        yield policies.recipe(known.workspace, source)
    yield from (known.prompts, known.usable)
    rounds = list(known.planned_rounds())
    for round_ in rounds:
        yield from _of_round(round_)
    yield from _steps(known.before)
    last = rounds[-1]
    whole = last.number == known.workspace.experiment.rounds.count
    if whole and known.workspace.artifacts.find(last.train) is not None:
        end = known.after(last)
        yield from _steps((*end.after, *end.divergence))
        yield from (end.evaluate, end.report)


def _of_round(round_: Round) -> Iterator[Recipe]:
    yield from _steps(round_.row_steps)
    for rewards in (round_.rewards, round_.references):
        if rewards is not None:
            yield from (rewards.recipe, rewards.completions.recipe, rewards.completions.texts)
    yield from (round_.quantiles, round_.logprobs.recipe, round_.training_set, round_.train)


def _evaluation(workspace: Workspace, known: Chain) -> tuple[Recipe, Recipe]:
    """The recipes of the evaluation and of the report, as to their settings."""
    evaluate = evaluation.recipe(workspace, {})
    return evaluate, evaluation.report_recipe(workspace, evaluate, known.first.train)


def _kind(recipe: dict[str, Any]) -> str:
    budget = _BUDGET.get(recipe["step"], ())
    config = {name: value for name, value in recipe["config"].items() if name not in budget}
    return canonical_json([recipe["step"], recipe["version"], config, sorted(recipe["inputs"])])


def _spellings(experiment: Experiment, policy: str) -> set[str]:
    """How recipes of an experiment name a policy: see `steps.blocks.drawn_from`."""
    return {policy, drawn_from(experiment, policy)}


def _steps(steps: Iterable[BlockStep]) -> Iterator[Recipe]:
    """The recipes of steps, and of the comparisons that one may need before."""
    for step in steps:
        for asked in (drawn.drawn_copy(step), parity.gate(step)):
            if asked is not None:
                yield asked.recipe
        yield step.recipe
