"""`qrpo gc`: find and delete what none of the named experiments uses.

The unit is a recipe: gc keeps it whole if one of the experiments uses it (`used_recipes`), if a kept recipe
was made from it, or if one of its objects is young, since a run in progress may have just written that. Of a
kept recipe, only old objects that no manifest names are garbage. Checkpoints are kept like results, but not
once their policy is committed.

The policies, evaluations and reports of all runs are kept, and the comparisons of them: only a run that is
named goes. What they were made from is kept for the experiments alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.common.formatting import size
from qrpo_core.maintenance.contents import RecipeObjects, StoreListing, list_store, total_bytes
from qrpo_core.maintenance.in_use import (
    StoredRecipe,
    finished_trainings,
    quarantined_policies,
    stored_recipes,
    used_recipes,
    with_inputs,
)
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.comparison import STEP as COMPARED
from qrpo_core.pipeline.run_ledger import RunLedger, StoredRun
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.text_table import table
from qrpo_core.store.backends.interface import Entry, Objects
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class Garbage:
    """Objects that are deleted together.

    entries : in the order of deletion, manifests before data. folder, seen : the listing that decided this;
    if the folder has changed since, its objects are kept. folder "" : each object was decided by itself.
    """

    what: str
    why: str
    entries: tuple[Entry, ...]
    folder: str = ""
    seen: tuple[Entry, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return total_bytes(self.entries)


@dataclass(frozen=True)
class KeptRun:
    """A run that none of the experiments uses. sizes : bytes of its artifacts that only runs keep, by key."""

    run: StoredRun
    sizes: dict[str, int]


@dataclass(frozen=True)
class Found:
    """What gc deletes, and the runs that it keeps although none of the experiments uses them."""

    garbage: list[Garbage]
    kept: list[KeptRun]


def garbage(
    workspaces: Sequence[Workspace], before: datetime, delete_runs: Sequence[StoredRun] = ()
) -> Found:
    """The objects that none of these experiments uses. All experiments share one store.

    before : objects that were modified at or after this time are young. delete_runs : runs whose policies,
    evaluations and reports go as well. Raises ConfigError for experiments of several stores and for a run
    that is in use or young, and the errors of `used_recipes`.
    """
    workspace = workspaces[0]
    stores = {each.objects.url for each in workspaces}
    if len(stores) > 1:
        raise ConfigError(
            "the experiments have several stores",
            where=", ".join(sorted(stores)),
            remedy="one store at a time",
        )
    runs = RunLedger(workspace.experiment.store).runs
    found = list_store(workspace.objects)
    stored = stored_recipes(workspace)
    kept: set[str] = set()
    quarantined = list(quarantined_policies(workspace))
    for each in workspaces:
        _check_reference(each, stored)
        used = used_recipes(each, [*stored, *quarantined])
        _check_trained(each, used.kept, stored, quarantined)
        _check_unused(each, delete_runs, used.now)
        kept |= used.kept
    kept -= finished_trainings(stored)
    young = {each.key for each in found.recipes if each.modified >= before}
    fresh = with_inputs(young, stored)
    _check_old(delete_runs, fresh)
    left = [run for run in runs if run.digest not in {each.digest for each in delete_runs}]
    kept = (kept | fresh) - (_keys(delete_runs) - _keys(left))
    amounts = {each.key: each.bytes for each in found.recipes if each.key not in kept}
    recipes = {each.key: each for each in stored}
    objects = _garbage(workspace, found, recipes, kept | _results(left, stored), before)
    return Found(list(objects), list(_kept_runs(left, amounts)))


def _keys(runs: Iterable[StoredRun]) -> set[str]:
    return {each.key for run in runs for each in run.artifacts}


def _kept_runs(runs: Iterable[StoredRun], amounts: Mapping[str, int]) -> Iterator[KeptRun]:
    for run in runs:
        if sizes := {each.key: amounts[each.key] for each in run.artifacts if each.key in amounts}:
            yield KeptRun(run, sizes)


def _own(run: StoredRun) -> set[str]:
    """The keys of its artifacts, without a policy that other evaluations may share."""
    return {each.key for each in (run.artifacts[:-1] or run.artifacts)}


def _results(runs: Iterable[StoredRun], stored: Sequence[StoredRecipe]) -> set[str]:
    """The keys of the runs' artifacts, of the benchmarks in their reports, and of the comparisons of them."""
    runs = list(runs)
    keys = _keys(runs)
    shown = {key for run in runs for each in run.reports for key in each.recipe["inputs"].values()}
    keys |= {each.key for each in stored if each.step == "benchmark" and each.key in shown}
    evaluated = {each.key for each in stored if each.step == "evaluate"}
    compared = (each for each in stored if each.step == COMPARED)
    return keys | {each.key for each in compared if each.inputs & evaluated <= keys}


def _check_unused(workspace: Workspace, runs: Iterable[StoredRun], used: Set[str]) -> None:
    """Raise ConfigError if a run that is to be deleted is the experiment's."""
    for run in runs:
        if used & _own(run):
            raise ConfigError(
                f"run {run.number} ({run.digest[:8]}) is a result of {workspace.experiment.name!r}",
                where=workspace.objects.url,
                remedy="name only experiments that you keep",
            )


def _check_old(runs: Iterable[StoredRun], fresh: Set[str]) -> None:
    """Raise ConfigError if a run that is to be deleted is young, or what something young was made from."""
    for run in runs:
        if fresh & _own(run):
            raise ConfigError(
                f"run {run.number} ({run.digest[:8]}) is young, or something young was made from it",
                where=f"made {run.date}",
                remedy="give a smaller --older-than",
            )


def _check_reference(workspace: Workspace, stored: Iterable[StoredRecipe]) -> None:
    """Raise MissingError if samples exist and the reference policy has no digest yet."""
    drawn = any(each.step == "sample" for each in stored)
    if drawn and policies.reference(workspace, policies.source_of(workspace)) is None:
        raise MissingError(
            f"the model of {workspace.experiment.name!r} is not converted, so its samples are unknown",
            where=workspace.objects.url,
            remedy="run precompute first",
        )


def _check_trained(
    workspace: Workspace, kept: Set[str], stored: Iterable[StoredRecipe], quarantined: Iterable[StoredRecipe]
) -> None:
    """Raise MissingError if a trained policy with an unreadable digest is quarantined and not made again."""
    made = {each.key for each in stored}
    for each in quarantined:
        if each.policy is None and each.key in kept and each.key not in made:
            raise MissingError(
                f"{each.step} {each.key} of {workspace.experiment.name!r} was quarantined unreadable, so "
                "the samples drawn from it are unknown",
                where=workspace.objects.url,
                remedy="run the experiment first",
            )


def _garbage(
    workspace: Workspace,
    found: StoreListing,
    stored: dict[str, StoredRecipe],
    kept: set[str],
    before: datetime,
) -> Iterator[Garbage]:
    for held in found.recipes:
        if held.manifests and held.key not in stored:
            continue  # its inputs are unknown, so it may be in use
        if held.key not in kept:
            data = [entry for entry in held.entries if entry not in held.manifests]
            what = f"{held.kind} {held.step}/{held.key}"
            entries = (*held.manifests, *data)
            yield Garbage(what, "not used", entries, f"{held.path}/", held.entries)
        else:
            named = _named(workspace, held, stored.get(held.key))
            orphans = [each for each in held.entries if each.key not in named and each.modified < before]
            if orphans:
                what = f"data in {held.kind} {held.step}/{held.key}"
                yield Garbage(what, "no manifest names it", tuple(orphans), f"{held.path}/", held.entries)
    reasons = {
        "tmp": "left by an interruption",
        "probe": "left by an interruption",
        "quarantine": "quarantined",
    }
    for folder, why in reasons.items():
        old = tuple(entry for entry in found.loose[folder] if entry.modified < before)
        if old:
            yield Garbage(f"{folder}/", why, old)
    budgets = tuple(
        entry
        for entry in found.loose["budgets"]
        if entry.modified < before and not kept.intersection(_budget_keys(entry.key))
    )
    if budgets:
        yield Garbage("budgets/", "of samples that are not used", budgets)


def _budget_keys(key: str) -> set[str]:
    """The keys of samples and rewards in `budgets/<samples>/<rewards>.json` (see `pipeline.budgets`)."""
    return set(key.removeprefix("budgets/").removesuffix(".json").split("/"))


def _named(workspace: Workspace, held: RecipeObjects, stored: StoredRecipe | None) -> set[str]:
    """The object keys of a recipe that its manifests name."""
    if held.kind == "checkpoints":
        return {entry.key for entry in held.entries}  # the training deletes what it does not need
    named = {entry.key for entry in held.manifests}
    if held.kind == "blocks":
        named |= {f"{held.path}/recipe.json", f"{held.path}/announced.json"}
        if stored is not None:
            # Listed after the data, so that no block committed in between is missed.
            blocks = workspace.blocks.committed(Recipe.from_dict(stored.recipe))
            named |= {block.file for block in blocks}
        return named
    if stored is not None:
        manifest = workspace.artifacts.get(Recipe.from_dict(stored.recipe))
        named |= {manifest.path(name) for name in manifest.files}
        named.add(f"{held.path}/_prefect.json")
    return named


def delete(objects: Objects, found: Sequence[Garbage]) -> list[Garbage]:
    """Delete the garbage; returns the parts that were kept because somebody wrote there meanwhile."""
    left = []
    for each in found:
        if each.folder and tuple(objects.entries(each.folder)) != each.seen:
            left.append(each)
            continue
        for entry in each.entries:
            objects.delete(entry.key)
    return left


def garbage_lines(found: Found, url: str, *, days: float) -> list[str]:
    """A table of the garbage, the total, and the runs that stay."""
    lines = [f"Store: {url}", ""]
    if not found.garbage:
        lines.append(f"Nothing to delete that is older than {days:g} days.")
    else:
        rows = [("what", "objects", "size", "last written", "why")]
        for each in found.garbage:
            last = max(entry.modified for entry in each.entries)
            rows.append(
                (each.what, f"{len(each.entries):,}", size(each.bytes), f"{last:%Y-%m-%d %H:%M}", each.why)
            )
        lines += [*table(rows), "", f"To delete: {_total(found.garbage)}."]
    return [*lines, *_kept_lines(found.kept)]


def _kept_lines(kept: Sequence[KeptRun]) -> list[str]:
    """The runs that stay though no experiment uses them, with the size of each."""
    if not kept:
        return []
    rows = [("no.", "run", "date", "experiment", "size")]
    for each in kept:
        run = each.run
        amount = size(sum(each.sizes.values()))
        rows.append((f"{run.number}", run.digest[:8], run.minute, run.name or "not known", amount))
    total = size(sum({key: amount for each in kept for key, amount in each.sizes.items()}.values()))
    runs = "run" if len(kept) == 1 else "runs"
    text = f"Kept, though none of these experiments uses them: {len(kept)} {runs} with policy and reports"
    return ["", f"{text}, {total}. --delete-run RUN deletes one as well.", *table(rows)]


def left_lines(found: Sequence[Garbage], left: Sequence[Garbage]) -> list[str]:
    """The outcome of `delete`."""
    gone = [each for each in found if each not in left]
    lines = [f"Kept, because it was written to meanwhile: {each.what}" for each in left]
    return [*lines, f"Deleted: {_total(gone)}."]


def _total(found: Sequence[Garbage]) -> str:
    objects, amount = sum(len(each.entries) for each in found), sum(each.bytes for each in found)
    return f"{objects:,} objects, {size(amount)}"
