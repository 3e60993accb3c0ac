"""`qrpo ls`: the recipes of a store, and which of them an experiment uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qrpo_core.common.formatting import size, to_the_second
from qrpo_core.maintenance.contents import RecipeObjects, list_store, total_bytes
from qrpo_core.maintenance.in_use import StoredRecipe, stored_recipes, used_recipes
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.text_table import table
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.quarantine import Quarantined
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """One recipe.

    rows : of its blocks, or the artifact's own count; None without a count. blocks : None for an artifact.
    created : of the artifact or of the newest block, empty if nothing is committed.
    used : "now" by the experiment as it is; "kept" at another budget, in another round, or as an input of a
    used recipe; "" otherwise.
    """

    step: str
    key: str
    blocks: int | None
    rows: int | None
    objects: int
    bytes: int
    created: str
    used: str


@dataclass(frozen=True)
class Listing:
    """The recipes of a store, as seen from one experiment.

    others : recipes, objects and bytes that are not in `lines`. loose : objects and bytes of other folders.
    """

    url: str
    lines: tuple[Line, ...]
    others: tuple[int, int, int]
    quarantined: tuple[Quarantined, ...]
    loose: dict[str, tuple[int, int]]
    objects: int
    bytes: int


def listing(workspace: Workspace, everything: bool) -> Listing:
    """The recipes that the experiment uses, or every recipe."""
    found = list_store(workspace.objects)
    stored = stored_recipes(workspace)
    used = used_recipes(workspace, stored)
    manifests = {manifest.key: manifest for manifest in workspace.artifacts.manifests()}
    recipes = {each.key: each for each in stored}
    shown = [each for each in found.recipes if everything or each.key in used.kept]
    lines = []
    for each in shown:
        use = "now" if each.key in used.now else "kept" if each.key in used.kept else ""
        if each.kind == "artifacts":
            lines.append(_artifact(each, manifests.get(each.key), use))
        elif each.kind == "checkpoints":
            size_ = (len(each.entries), each.bytes)
            lines.append(Line(each.kind, each.key, None, None, *size_, "", use))
        else:
            lines.append(_blocks(workspace, each, recipes.get(each.key), use))
    others = [each for each in found.recipes if each not in shown]
    rest = (len(others), sum(len(each.entries) for each in others), sum(each.bytes for each in others))
    loose = {name: (len(entries), total_bytes(entries)) for name, entries in found.loose.items() if entries}
    quarantined = tuple(workspace.blocks.quarantined())
    return Listing(workspace.objects.url, tuple(lines), rest, quarantined, loose, found.objects, found.bytes)


def _artifact(held: RecipeObjects, manifest: Manifest | None, use: str) -> Line:
    rows = None if manifest is None else manifest.facts.get("rows")
    created = "" if manifest is None else manifest.created
    return Line(held.step, held.key, None, rows, len(held.entries), held.bytes, created, use)


def _blocks(workspace: Workspace, held: RecipeObjects, stored: StoredRecipe | None, use: str) -> Line:
    blocks = [] if stored is None else workspace.blocks.committed(Recipe.from_dict(stored.recipe))
    return Line(
        held.step,
        held.key,
        len(blocks),
        sum(block.rows for block in blocks),
        len(held.entries),
        held.bytes,
        max((block.created for block in blocks), default=""),
        use,
    )


def listing_lines(found: Listing) -> list[str]:
    """A table of the recipes, the other objects, and the totals."""
    rows: list[tuple[str, ...]] = [("step", "recipe", "blocks", "rows", "objects", "size", "created", "used")]
    rows += [_row(line) for line in found.lines]
    lines = [f"Store: {found.url}", ""]
    lines += table(rows) if found.lines else ["Nothing of this experiment."]
    recipes, objects, size_ = found.others
    if recipes:
        lines += [
            "",
            f"Not used by it: {recipes} recipes, {objects} objects, {size(size_)} (--all lists them)",
        ]
    if found.quarantined:
        lines += ["", f"Quarantined: {len(found.quarantined)}", *table(_quarantined(found.quarantined))]
    loose = {name: counts for name, counts in found.loose.items() if name != "quarantine"}
    lines += [""] + [f"{name}/: {count} objects, {size(amount)}" for name, (count, amount) in loose.items()]
    return [*lines, f"In all: {found.objects} objects, {size(found.bytes)}"]


def _row(line: Line) -> tuple[str, ...]:
    counts = ["-" if value is None else f"{value:,}" for value in (line.blocks, line.rows, line.objects)]
    return (
        line.step,
        line.key,
        *counts,
        size(line.bytes),
        to_the_second(line.created) or "not committed",
        line.used or "no",
    )


def _quarantined(quarantined: Sequence[Quarantined]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("step", "recipe", "block", "rows", "when", "why")]
    return rows + [
        (each.step, each.key, each.block, f"{each.rows}", each.when, each.why) for each in quarantined
    ]
