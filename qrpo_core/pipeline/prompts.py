"""The prompts artifact: reading the source, its recipe, its tables, and the day of chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.schemas import OFFLINE, PROMPTS
from qrpo_core.config import PromptsConfig, cache_key_fields
from qrpo_core.data.evaluation_prompts import with_test_set
from qrpo_core.data.sources import PromptSet, load_prompts, source_identity
from qrpo_core.models.template_clock import today
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.store.backends.opening import s3_options
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 4


def recipe(workspace: Workspace) -> Recipe:
    """Decided by `prompts`, `evaluation.prompts`, and the content of the sources, not their place."""
    fields = _fields(workspace, workspace.experiment.prompts)
    test = workspace.experiment.evaluation.prompts
    if test is not None:  # absent without a test set, so that older recipes keep their keys
        fields["evaluation"] = _fields(workspace, test)
    return Recipe("prompts", VERSION, fields)


def _fields(workspace: Workspace, config: PromptsConfig) -> dict[str, Any]:
    place = ("path", "name", "revision")
    fields = {name: value for name, value in cache_key_fields(config).items() if name not in place}
    return fields | {"source": source_identity(config, storage_options(workspace))}


def read(workspace: Workspace) -> PromptSet:
    """The prompts of the source, and of the test set. Raises DataError or ConfigError."""
    experiment, options = workspace.experiment, storage_options(workspace)
    found = load_prompts(experiment.prompts, options)
    if experiment.evaluation.prompts is None:
        return found
    lenient = {"on_unusable": experiment.prompts.on_unusable}
    test = load_prompts(experiment.evaluation.prompts.model_copy(update=lenient), options)
    both = (experiment.prompts, experiment.evaluation.prompts)
    first, second = (2 * len(config.examples) for config in both)
    return with_test_set(found, test, experiment.prompts.on_unusable, (first, second))


@dataclass(frozen=True)
class PromptTables:
    """The tables of the prompts that the experiment uses.

    prompts : PROMPTS rows. offline : OFFLINE rows if the run trains on them, else None.
    counts : what happened to the source's rows; see `data.sources.PromptSet`.
    """

    prompts: pa.Table
    offline: pa.Table | None
    counts: Mapping[str, int] = field(default_factory=dict)


def stored(workspace: Workspace, manifest: Manifest) -> PromptTables:
    """The tables of a prompts artifact."""
    settle_day(workspace, manifest)
    offline = workspace.load(manifest, "offline.parquet", OFFLINE) if _uses_offline(workspace) else None
    table = workspace.load(manifest, "prompts.parquet", PROMPTS)
    return PromptTables(table, offline, manifest.facts["counts"])


def settle_day(workspace: Workspace, manifest: Manifest | None) -> None:
    """Set the day that chat templates take for today: that of the prompts artifact, or `prompts.date` if set.

    So rows that are drawn and scored later are rendered like the stored ones. Without an artifact it is
    today, the day of the artifact that the run would make.
    """
    made = today() if manifest is None else manifest.created[:10]
    workspace.day = workspace.experiment.prompts.date or made


def _uses_offline(workspace: Workspace) -> bool:
    return workspace.experiment.training_data.uses_data_set


def find(workspace: Workspace, prompts_recipe: Recipe) -> PromptTables:
    """The tables from the store if it has them, else from the source."""
    manifest = workspace.artifacts.find(prompts_recipe)
    if manifest is not None:
        return stored(workspace, manifest)
    settle_day(workspace, None)
    return tables_of(workspace, read(workspace))


def tables_of(workspace: Workspace, source: PromptSet) -> PromptTables:
    """The tables of a source that was read."""
    return PromptTables(source.prompts, source.offline if _uses_offline(workspace) else None, source.counts)


def build(workspace: Workspace, prompts_recipe: Recipe) -> Manifest:
    """Read the source and commit `prompts.parquet` and `offline.parquet`; returns the artifact."""

    def make(scratch: Path) -> Built:
        found = read(workspace)
        files: dict[str, Path | bytes] = {
            "prompts.parquet": as_parquet(found.prompts, PROMPTS, "prompts"),
            "offline.parquet": as_parquet(found.offline, OFFLINE, "offline completions"),
        }
        facts = {"counts": found.counts, "rows": len(found.prompts)}
        return files, facts | ({"overlap": list(found.overlap)} if found.overlap else {})

    return workspace.make(prompts_recipe, make)


def storage_options(workspace: Workspace) -> dict[str, Any]:
    """The settings of s3fs for prompt files in S3, the same as those of the store."""
    return s3_options(workspace.experiment.store)


def of_split(prompts: pa.Table, split: str) -> pa.Table:
    """The prompts of one split, shortest conversation first, so that prompts of a block have like lengths."""
    chosen = prompts.filter(pc.equal(prompts.column("split"), split))
    sizes = [
        sum(len(turn["content"]) for turn in messages) for messages in chosen.column("messages").to_pylist()
    ]
    chosen = chosen.append_column("size", pa.array(sizes, pa.int64()))
    return chosen.sort_by([("size", "ascending"), ("prompt_id", "ascending")]).drop_columns("size")
