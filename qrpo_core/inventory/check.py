"""`qrpo verify`: is every stored byte what its manifest says, and what is done where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from qrpo_core.errors import DamagedError
from qrpo_core.inventory.holdings import holdings
from qrpo_core.inventory.text import size
from qrpo_core.inventory.uses import stored_recipes, uses
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.blocks import BlockManifest, Check

#: Called with the number of objects looked at so far, and their bytes.
Progress = Callable[[int, int], None]

#: Prompts of a damaged block that are spelled out.
_RUNS_SHOWN = 3

_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Verified:
    """What was looked at.

    scope : "used" by the experiment, or "all" of the store; that also where damage hides what is used.
    damaged : what is not whole. aside : object keys that the damaged manifests were moved to.
    """

    scope: str
    objects: int
    bytes: int
    damaged: tuple[Check, ...]
    aside: tuple[str, ...]


def verify(
    workspace: Workspace, *, everything: bool = False, repair: bool = False, progress: Progress | None = None
) -> Verified:
    """Compare content with digests. `everything`: of the store, not only what the experiment uses.

    repair : set the manifests of what is damaged aside, so that the next run makes just that again.
    """
    scope = None if everything else _used(workspace)
    damaged: list[Check] = []
    aside: list[str] = []
    objects = amount = 0
    for check in _checks(workspace, scope):
        objects, amount = objects + 1, amount + check.bytes
        if progress is not None:
            progress(objects, amount)
        if check.damage:
            damaged.append(check)
    if repair:
        aside = list(_set_aside(workspace, damaged))
    return Verified("all" if scope is None else "used", objects, amount, tuple(damaged), tuple(aside))


def _used(workspace: Workspace) -> frozenset[str] | None:
    """Keys that the experiment uses; None where that cannot be told because something is damaged."""
    with suppress(DamagedError):
        return uses(workspace, stored_recipes(workspace)).kept
    return None


def _checks(workspace: Workspace, scope: frozenset[str] | None) -> Iterator[Check]:
    """Every object of the recipes in scope, and every manifest of the store that cannot be read."""
    for check in workspace.artifacts.check_manifests():
        if check.damage:
            yield check
    with suppress(DamagedError):  # unreadable manifests, which were all named just now
        for manifest in workspace.artifacts.manifests():
            if scope is None or manifest.key in scope:
                yield from workspace.artifacts.verify(manifest)
    recipes = workspace.blocks.all_recipes()
    for recipe in recipes:
        if scope is None or recipe.key in scope:
            yield from workspace.blocks.verify(recipe)
    named = {recipe.key for recipe in recipes}
    for held in holdings(workspace.objects, "blocks"):
        if held.manifests and held.key not in named and (scope is None or held.key in scope):
            yield Check(
                f"{held.path}/{_RECIPE}", 0, 0, f"gone, so {len(held.manifests)} blocks have no name", None
            )


def _set_aside(workspace: Workspace, damaged: Sequence[Check]) -> Iterator[str]:
    """Each damaged manifest once; an artifact may have several damaged files."""
    done = set()
    for check in damaged:
        manifest = check.manifest
        if isinstance(manifest, BlockManifest):
            yield workspace.blocks.set_aside(manifest, check.damage)
        elif isinstance(manifest, Manifest):
            if manifest.key not in done:
                done.add(manifest.key)
                yield workspace.artifacts.set_aside(manifest, check.damage)
        elif check.key.endswith(f"/{_RECIPE}"):
            continue  # the recipe's next block writes it again
        elif check.key.startswith("blocks/"):
            yield workspace.blocks.set_aside(check.key, check.damage)
        else:
            yield workspace.artifacts.set_aside(check.key, check.damage)


def verified_lines(found: Verified, url: str) -> list[str]:
    """What is damaged, with its rows, and what that means for the next run."""
    what = "all of the store" if found.scope == "all" else "all that the experiment uses"
    looked = f"Verified {what}: {found.objects:,} objects, {size(found.bytes)}."
    lines = [f"Store: {url}", ""]
    if not found.damaged:
        return [*lines, f"{looked} Everything is whole."]
    for each in found.damaged:
        lines += [f"Damaged: {each.key}", f"  {each.damage}{_rows(each)}"]
    lines += ["", f"{looked} {len(found.damaged)} damaged."]
    if found.aside:
        return [*lines, f"Set aside: {len(found.aside)}. The next run makes only these again."]
    return [*lines, "--repair sets them aside, so that the next run makes only these again."]


def _rows(check: Check) -> str:
    """How many rows are lost with a damaged block, and the first of them."""
    if not isinstance(check.manifest, BlockManifest):
        return ""
    runs = check.manifest.runs
    shown = [
        f"{run.key.partition('.')[0]}:{run.first}-{run.first + run.count - 1}"
        for run in islice(runs, _RUNS_SHOWN)
    ]
    more = f" and more of {len(runs) - len(shown)} others" if len(runs) > len(shown) else ""
    return f"; {check.rows:,} rows: {', '.join(shown)}{more}"
