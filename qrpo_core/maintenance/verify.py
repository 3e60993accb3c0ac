"""`qrpo verify`: compare every stored object with the digest in its manifest, and quarantine damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from qrpo_core.common.errors import DamagedError
from qrpo_core.common.formatting import size
from qrpo_core.maintenance.contents import objects_by_recipe
from qrpo_core.maintenance.in_use import stored_recipes, used_recipes
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.checkpoint_store import FOLDER, CheckpointStore, stored_trainings
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.verification import Check

#: Called with the number of objects verified so far, and their bytes.
Progress = Callable[[int, int], None]

#: Row ranges of a damaged block that are shown.
_RANGES_SHOWN = 3

_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Verified:
    """The outcome of a verification.

    scope : "used" by the experiment, or "all" of the store; also "all" if damage hides what is used.
    damaged : the failed checks. quarantined : object keys that the damaged manifests were moved to.
    """

    scope: str
    objects: int
    bytes: int
    damaged: tuple[Check, ...]
    quarantined: tuple[str, ...]


def verify(
    workspace: Workspace, *, everything: bool = False, repair: bool = False, progress: Progress | None = None
) -> Verified:
    """Compare content with digests. everything : of the whole store, not only what the experiment uses.

    repair : quarantine damaged manifests, so that the next run makes only these results again.
    """
    scope = None if everything else _used(workspace)
    damaged: list[Check] = []
    quarantined: list[str] = []
    objects = amount = 0
    for check in _checks(workspace, scope):
        objects, amount = objects + 1, amount + check.bytes
        if progress is not None:
            progress(objects, amount)
        if check.damage:
            damaged.append(check)
    if repair:
        quarantined = list(_quarantine(workspace, damaged))
    return Verified("all" if scope is None else "used", objects, amount, tuple(damaged), tuple(quarantined))


def _used(workspace: Workspace) -> frozenset[str] | None:
    """The recipe keys that the experiment uses; None if damage hides them."""
    with suppress(DamagedError):
        return used_recipes(workspace, stored_recipes(workspace)).kept
    return None


def _checks(workspace: Workspace, scope: frozenset[str] | None) -> Iterator[Check]:
    """The checks of the objects of the recipes in scope, and of every unreadable manifest of the store."""
    for check in workspace.artifacts.check_manifests():
        if check.damage:
            yield check
    with suppress(DamagedError):  # unreadable manifests: yielded above
        for manifest in workspace.artifacts.manifests():
            if scope is None or manifest.key in scope:
                yield from workspace.artifacts.verify(manifest)
    for training in stored_trainings(workspace.objects):
        if scope is None or training.key in scope:
            yield from CheckpointStore(workspace.experiment.store, training).check()
    recipes = workspace.blocks.all_recipes()
    for recipe in recipes:
        if scope is None or recipe.key in scope:
            yield from workspace.blocks.verify(recipe)
    named = {recipe.key for recipe in recipes}
    for held in objects_by_recipe(workspace.objects, "blocks"):
        if held.manifests and held.key not in named and (scope is None or held.key in scope):
            yield Check(
                f"{held.path}/{_RECIPE}", 0, 0, f"gone, so {len(held.manifests)} blocks have no name", None
            )


def _quarantine(workspace: Workspace, damaged: Sequence[Check]) -> Iterator[str]:
    """Quarantine each damaged manifest once; an artifact may have several damaged files."""
    done = set()
    for check in damaged:
        manifest = check.manifest
        if isinstance(manifest, BlockManifest):
            yield workspace.blocks.quarantine(manifest, check.damage)
        elif isinstance(manifest, Manifest):
            if manifest.key not in done:
                done.add(manifest.key)
                yield workspace.artifacts.quarantine(manifest, check.damage)
        elif check.key.endswith(f"/{_RECIPE}"):
            continue  # the recipe's next block writes it again
        elif check.key.startswith(f"{FOLDER}/"):
            continue  # a training takes the checkpoint before
        elif check.key.startswith("blocks/"):
            yield workspace.blocks.quarantine(check.key, check.damage)
        else:
            yield workspace.artifacts.quarantine(check.key, check.damage)


def verified_lines(found: Verified, url: str) -> list[str]:
    """The damage, with its rows, and the totals."""
    what = "all of the store" if found.scope == "all" else "all that the experiment uses"
    looked = f"Verified {what}: {found.objects:,} objects, {size(found.bytes)}."
    lines = [f"Store: {url}", ""]
    if not found.damaged:
        return [*lines, f"{looked} Nothing is damaged."]
    for each in found.damaged:
        lines += [f"Damaged: {each.key}", f"  {each.damage}{_rows(each)}"]
    lines += ["", f"{looked} {len(found.damaged)} damaged."]
    if found.quarantined:
        return [*lines, f"Quarantined: {len(found.quarantined)}. The next run makes only these again."]
    return [*lines, "--repair quarantines them, so that the next run makes only these again."]


def _rows(check: Check) -> str:
    """The number of rows of a damaged block, and the first of them."""
    if not isinstance(check.manifest, BlockManifest):
        return ""
    ranges = check.manifest.ranges
    shown = [
        f"{each.key.partition('.')[0]}:{each.first}-{each.first + each.count - 1}"
        for each in islice(ranges, _RANGES_SHOWN)
    ]
    more = f" and more of {len(ranges) - len(shown)} others" if len(ranges) > len(shown) else ""
    return f"; {check.rows:,} rows: {', '.join(shown)}{more}"
