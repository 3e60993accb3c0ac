"""Policies: the reference policy and the trained ones, identified by a digest of their content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from qrpo_core.common.hashing import digest_json
from qrpo_core.models.loading import convert_gguf
from qrpo_core.models.source import POLICY_FILES, WEIGHT_FILES, ModelSource, policy_digest, resolve_model
from qrpo_core.models.special_tokens import special_tokens
from qrpo_core.models.template_clock import folder_reads_clock
from qrpo_core.pipeline.workspace import Built, Workspace
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 2

#: Folder of LoRA adapters in the directory of the policy that they were merged into.
ADAPTER = "adapter"


@dataclass(frozen=True)
class Policy:
    """A model that can be sampled from.

    digest : of weights, config, tokenizer and chat template; for a hub model, of its commit.
    locate : returns its directory and downloads it if needed; `qrpo plan` never calls this.
    start : the policy that training started from; None for a policy that was not trained here.
    adapted : whether it was trained with LoRA; then its adapters are in `ADAPTER` of its directory.
    reads_clock : whether its chat template reads the time.
    special : the tokens that its tokenizer may treat as special.
    artifact : the artifact that holds it; None for a policy that was not trained here.
    """

    digest: str
    locate: Callable[[], Path]
    start: Policy | None = None
    adapted: bool = False
    reads_clock: bool = False
    special: frozenset[str] = frozenset()
    artifact: Manifest | None = None

    @property
    def directory(self) -> Path:
        """The local directory for `from_pretrained`; downloads the policy if needed."""
        return self.locate()


def source_of(workspace: Workspace) -> ModelSource:
    """The model at `model.path`, checked without loading weights."""
    return resolve_model(workspace.experiment.model)


def recipe(workspace: Workspace, source: ModelSource) -> Recipe:
    """The recipe of the converted model, for sources that need conversion (GGUF)."""
    config = {"dtype": workspace.experiment.model.dtype}
    return Recipe("model", VERSION, config, {"source": digest_json(source.identity)})


def convert(workspace: Workspace, source: ModelSource) -> Manifest:
    """Commit the model as safetensors with its tokenizer and template; returns the artifact."""

    def build(scratch: Path) -> Built:
        folder = scratch / "policy"
        split = convert_gguf(source, workspace.experiment.model.dtype, folder)
        return folder_files(folder), {"source": source.identity, **split}

    return workspace.make(recipe(workspace, source), build)


def reference(workspace: Workspace, source: ModelSource) -> Policy | None:
    """The reference policy; None if it needs conversion and is not converted yet."""
    if source.kind == "hub":
        located = cache(lambda: source.directory)
        return Policy(
            digest_json(source.identity), located, reads_clock=source.reads_clock, special=source.special
        )
    if not source.needs_conversion:
        return at(source.directory)
    manifest = workspace.artifacts.find(recipe(workspace, source))
    return None if manifest is None else stored(workspace, manifest)


def stored(workspace: Workspace, manifest: Manifest, start: Policy | None = None) -> Policy:
    """The policy of a model or train artifact. start : the policy that training started from."""
    digest = digest_of(manifest.files)
    assert digest is not None
    # What it says of its tokenizer needs no weights, which are large to download.
    folder = workspace.artifacts.folder(manifest, "policy", but=WEIGHT_FILES)
    return Policy(
        digest,
        lambda: workspace.artifacts.folder(manifest, "policy"),
        start=start,
        adapted=f"policy/{ADAPTER}/adapter_config.json" in manifest.files,
        reads_clock=folder_reads_clock(folder),
        special=special_tokens(folder),
        artifact=None if start is None else manifest,
    )


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The digest of the policy among the files of a model or train artifact's manifest; None without one.

    It equals `policy_digest` of its directory, but downloads nothing.
    """
    names = {name: Path(name).name for name in files if Path(name).parent == Path("policy")}
    digests = {
        base: files[name]["digest"]
        for name, base in names.items()
        if any(fnmatch(base, pattern) for pattern in POLICY_FILES)
    }
    return digest_json(digests) if digests else None


def at(directory: Path) -> Policy:
    """The policy of a local directory."""
    return Policy(
        policy_digest(directory),
        lambda: directory,
        reads_clock=folder_reads_clock(directory),
        special=special_tokens(directory),
    )


def rendering(workspace: Workspace, policy: Policy) -> dict[str, Any]:
    """The settings beside the policy that change how its template renders conversations, for recipes.

    JSON types; empty if there are none, so that the recipe is the same as before these settings existed.
    """
    found: dict[str, Any] = {"date": workspace.day} if policy.reads_clock else {}
    if variables := workspace.experiment.model.chat_template_kwargs:
        found["chat_template_kwargs"] = variables
    return found


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """The files below a folder by their relative paths, which begin with the folder's name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in files}
