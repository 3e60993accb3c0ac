"""`qrpo compact`: merge the small blocks of an experiment into few large ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qrpo_core.maintenance.in_use import stored_recipes, used_recipes
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.text_table import table
from qrpo_core.store.blocks.compaction import Compaction
from qrpo_core.store.recipe import Recipe


def compact(workspace: Workspace) -> Iterator[tuple[Recipe, Compaction]]:
    """Merge the blocks of each recipe in use, up to `store.rows_per_block` rows a block."""
    used = used_recipes(workspace, stored_recipes(workspace)).kept
    for recipe in workspace.blocks.all_recipes():
        if recipe.key in used:
            yield recipe, workspace.blocks.compact(recipe, workspace.experiment.store.rows_per_block)


def compaction_lines(done: Sequence[tuple[Recipe, Compaction]], url: str) -> list[str]:
    """A table of the blocks of each recipe before and after."""
    lines = [f"Store: {url}", ""]
    if not done:
        return [*lines, "No blocks of this experiment yet."]
    rows = [("step", "recipe", "blocks before", "after", "rows rewritten")]
    for recipe, made in done:
        rows.append((recipe.step, recipe.key, f"{made.before:,}", f"{made.after:,}", f"{made.rows:,}"))
    before, after = (sum(getattr(made, name) for _, made in done) for name in ("before", "after"))
    return [*lines, *table(rows), "", f"Blocks: {before:,} before, {after:,} after."]
