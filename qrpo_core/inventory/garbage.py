"""`qrpo gc`: what no experiment of those named refers to, and how it is deleted.

The unit is a recipe: it is kept whole if one of the experiments uses it (`uses`), if anything that is kept
was made from it, or if any object of it is young, since a run in progress has just written that. Of what is
kept, only objects that no manifest names are garbage, once they are old.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from qrpo_core.errors import ConfigError, MissingError
from qrpo_core.inventory.holdings import Contents, Holding, contents, total_bytes
from qrpo_core.inventory.text import size
from qrpo_core.inventory.uses import Stored, needed, set_aside_policies, stored_recipes, uses
from qrpo_core.show import table
from qrpo_core.steps import policies
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.objects import Entry, Objects
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class Garbage:
    """Objects that go together.

    entries : in the order in which they are deleted, manifests before data. folder, seen : the listing that
    this was judged by; objects of a folder that has changed since are left alone. "" : judged one by one.
    """

    what: str
    why: str
    entries: tuple[Entry, ...]
    folder: str = ""
    seen: tuple[Entry, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all its objects."""
        return total_bytes(self.entries)


def garbage(workspaces: Sequence[Workspace], before: datetime) -> list[Garbage]:
    """What may be deleted, if only these experiments count. All of them share one store.

    before : objects that were modified at or after this time are young. Raises ConfigError for experiments of
    several stores, and whatever hinders knowing what an experiment uses.
    """
    workspace = workspaces[0]
    stores = {each.objects.url for each in workspaces}
    if len(stores) > 1:
        raise ConfigError(
            "the experiments have several stores",
            where=", ".join(sorted(stores)),
            remedy="one store at a time",
        )
    found = contents(workspace.objects)
    stored = stored_recipes(workspace)
    kept: set[str] = set()
    aside = list(set_aside_policies(workspace))
    for each in workspaces:
        _check_reference(each, stored)
        used = uses(each, [*stored, *aside])
        _check_trained(each, used.kept, stored, aside)
        kept |= used.kept
    young = {each.key for each in found.holdings if each.modified >= before}
    kept |= needed(young, stored)
    return list(_garbage(workspace, found, {each.key: each for each in stored}, kept, before))


def _check_reference(workspace: Workspace, stored: Iterable[Stored]) -> None:
    """Refuse to judge samples while the policy that drew them has no name."""
    drawn = any(each.step == "sample" for each in stored)
    if drawn and policies.reference(workspace, policies.source_of(workspace)) is None:
        raise MissingError(
            f"the model of {workspace.experiment.name!r} is not converted, so its samples cannot be told "
            "from others",
            where=workspace.objects.url,
            remedy="run precompute first",
        )


def _check_trained(
    workspace: Workspace, kept: Set[str], stored: Iterable[Stored], aside: Iterable[Stored]
) -> None:
    """The same where a trained policy was set aside with its name unreadable, and is not made again yet."""
    made = {each.key for each in stored}
    for each in aside:
        if each.policy is None and each.key in kept and each.key not in made:
            raise MissingError(
                f"{each.step} {each.key} of {workspace.experiment.name!r} was set aside unreadable, so what "
                "was drawn from it cannot be told",
                where=workspace.objects.url,
                remedy="run the experiment first",
            )


def _garbage(
    workspace: Workspace, found: Contents, stored: dict[str, Stored], kept: set[str], before: datetime
) -> Iterator[Garbage]:
    for held in found.holdings:
        if held.manifests and held.key not in stored:
            continue  # nothing says what it was made from, so nothing says that it is not used
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
    reasons = {"tmp": "left by an interruption", "probe": "left by an interruption", "aside": "set aside"}
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
    """The keys of samples and rewards in `budgets/<samples>/<rewards>.json` (see `steps.budgets`)."""
    return set(key.removeprefix("budgets/").removesuffix(".json").split("/"))


def _named(workspace: Workspace, held: Holding, stored: Stored | None) -> set[str]:
    """The objects of a holding that have a place there."""
    named = {entry.key for entry in held.manifests}
    if held.kind == "blocks":
        named.add(f"{held.path}/recipe.json")
        if stored is not None:
            # Listed after the data, so that a block which was committed in between is not missed.
            blocks = workspace.blocks.committed(Recipe.from_dict(stored.recipe))
            named |= {block.file for block in blocks}
        return named
    if stored is not None:
        manifest = workspace.artifacts.get(Recipe.from_dict(stored.recipe))
        named |= {manifest.path(name) for name in manifest.files}
        named.add(f"{held.path}/_prefect.json")
    return named


def delete(objects: Objects, found: Sequence[Garbage]) -> list[Garbage]:
    """Delete it, one piece after another; returns those left alone because somebody wrote there meanwhile."""
    left = []
    for each in found:
        if each.folder and tuple(objects.entries(each.folder)) != each.seen:
            left.append(each)
            continue
        for entry in each.entries:
            objects.delete(entry.key)
    return left


def garbage_lines(found: Sequence[Garbage], url: str, *, days: float) -> list[str]:
    """A table of what may go, and the total."""
    lines = [f"Store: {url}", ""]
    if not found:
        return [*lines, f"Nothing to delete that is older than {days:g} days."]
    rows = [("what", "objects", "size", "last written", "why")]
    for each in found:
        last = max(entry.modified for entry in each.entries)
        rows.append(
            (each.what, f"{len(each.entries):,}", size(each.bytes), f"{last:%Y-%m-%d %H:%M}", each.why)
        )
    return [*lines, *table(rows), "", f"To delete: {_total(found)}."]


def left_lines(found: Sequence[Garbage], left: Sequence[Garbage]) -> list[str]:
    """What `delete` has done."""
    gone = [each for each in found if each not in left]
    lines = [f"Left alone, because it was written to meanwhile: {each.what}" for each in left]
    return [*lines, f"Deleted: {_total(gone)}."]


def _total(found: Sequence[Garbage]) -> str:
    objects, amount = sum(len(each.entries) for each in found), sum(each.bytes for each in found)
    return f"{objects:,} objects, {size(amount)}"
