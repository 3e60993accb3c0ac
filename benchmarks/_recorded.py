"""What the manifests and blocks of a store record of each step."""

from __future__ import annotations

from collections import Counter

from qrpo_core.pipeline.workspace import Workspace


def recorded(workspace: Workspace) -> tuple[Counter[str], Counter[str]]:
    """By step: rows or artifacts, and the seconds that they took."""
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for manifest in workspace.artifacts.manifests():
        counts[manifest.step] += 1
        seconds[manifest.step] += manifest.seconds
    for recipe in workspace.blocks.all_recipes():
        for block in workspace.blocks.committed(recipe):
            counts[recipe.step] += block.rows
            seconds[recipe.step] += block.seconds
    return counts, seconds
