"""Prompts: read, checked, merged, split; and what is asked of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import recipe_fields
from qrpo_core.data.sources import PromptSet, load_prompts, source_identity
from qrpo_core.records import OFFLINE, PROMPTS
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.objects import s3_options
from qrpo_core.store.recipe import Recipe
from qrpo_core.template_clock import today

VERSION = 3


def recipe(workspace: Workspace) -> Recipe:
    """Decided by the section and by the content of the source, not by where the source lies."""
    config = workspace.experiment.prompts
    place = ("path", "name", "revision")
    fields = {name: value for name, value in recipe_fields(config).items() if name not in place}
    return Recipe(
        "prompts", VERSION, fields | {"source": source_identity(config, storage_options(workspace))}
    )


def read(workspace: Workspace) -> PromptSet:
    """Read the source; every problem is a DataError or ConfigError."""
    return load_prompts(workspace.experiment.prompts, storage_options(workspace))


@dataclass(frozen=True)
class PromptTables:
    """PROMPTS rows, and where training uses the data set's own completions their OFFLINE rows.

    counts : what happened to the source's rows; see `data.sources.PromptSet`.
    """

    prompts: pa.Table
    offline: pa.Table | None
    counts: Mapping[str, int] = field(default_factory=dict)


def stored(workspace: Workspace, manifest: Manifest) -> PromptTables:
    """The tables of a prompts artifact that the experiment uses."""
    settle_day(workspace, manifest)
    offline = load(workspace, manifest, "offline.parquet", OFFLINE) if _uses_offline(workspace) else None
    table = load(workspace, manifest, "prompts.parquet", PROMPTS)
    return PromptTables(table, offline, manifest.facts["counts"])


def settle_day(workspace: Workspace, manifest: Manifest | None) -> None:
    """Let chat templates take the day of the prompts artifact for today, unless the experiment names a day.

    What is drawn and scored later is then rendered as what is there. Without an artifact it is today, the day
    of the artifact that the run would make.
    """
    made = today() if manifest is None else manifest.created[:10]
    workspace.day = workspace.experiment.prompts.date or made


def _uses_offline(workspace: Workspace) -> bool:
    return workspace.experiment.training_data.mode == "offline"


def find(workspace: Workspace, asked: Recipe) -> PromptTables:
    """The same from the store if it has them, else read from the source."""
    manifest = workspace.artifacts.find(asked)
    if manifest is not None:
        return stored(workspace, manifest)
    settle_day(workspace, None)
    return tables_of(workspace, read(workspace))


def tables_of(workspace: Workspace, source: PromptSet) -> PromptTables:
    """What the experiment uses of a source that was read."""
    return PromptTables(source.prompts, source.offline if _uses_offline(workspace) else None, source.counts)


def build(workspace: Workspace, asked: Recipe) -> Manifest:
    """Read the source and commit the tables `prompts.parquet` and `offline.parquet`."""

    def make(scratch: Path) -> Built:
        found = read(workspace)
        files: dict[str, Path | bytes] = {
            "prompts.parquet": to_bytes(found.prompts, PROMPTS, "prompts"),
            "offline.parquet": to_bytes(found.offline, OFFLINE, "offline completions"),
        }
        return files, {"counts": found.counts, "rows": len(found.prompts)}

    return workspace.make(asked, make)


def storage_options(workspace: Workspace) -> dict[str, Any]:
    """Settings of s3fs for prompt files in S3: those of the store."""
    return s3_options(workspace.experiment.store)


def of_split(prompts: pa.Table, split: str) -> pa.Table:
    """The prompts of one split, shortest conversation first, so that blocks hold prompts of like length."""
    chosen = prompts.filter(pc.equal(prompts.column("split"), split))
    sizes = [
        sum(len(turn["content"]) for turn in messages) for messages in chosen.column("messages").to_pylist()
    ]
    chosen = chosen.append_column("size", pa.array(sizes, pa.int64()))
    return chosen.sort_by([("size", "ascending"), ("prompt_id", "ascending")]).drop_columns("size")
