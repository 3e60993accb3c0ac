"""Policies: the reference that training starts from, and the trained one. Named by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qrpo_core.ids import digest_json
from qrpo_core.policy import ModelSource, materialise, policy_digest, resolve_model
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe
from qrpo_core.template_clock import folder_reads_clock
from qrpo_core.thinking_marks import special_tokens

VERSION = 2

#: Folder of LoRA adapters in the directory of the policy that they were merged into.
ADAPTER = "adapter"


@dataclass(frozen=True)
class Policy:
    """A model that can be sampled from.

    digest : of weights, config, tokenizer and chat template; for a hub model, of its commit.
    locate : fetches it if need be and says where it lies; planning never asks.
    start : the policy that training started from; None for one that was not trained here.
    adapted : whether it was trained with LoRA: then its adapters lie in `ADAPTER` of its directory.
    reads_clock : whether its chat template asks for the time.
    special : the tokens that its tokenizer may call special.
    made : the artifact that holds it; None for one that was not trained here.
    """

    digest: str
    locate: Callable[[], Path]
    start: Policy | None = None
    adapted: bool = False
    reads_clock: bool = False
    special: frozenset[str] = frozenset()
    made: Manifest | None = None

    @property
    def directory(self) -> Path:
        """Where `from_pretrained` loads it from, on this machine."""
        return self.locate()


def source_of(workspace: Workspace) -> ModelSource:
    """What `model.path` names, checked without loading weights."""
    return resolve_model(workspace.experiment.model)


def recipe(workspace: Workspace, source: ModelSource) -> Recipe:
    """The converted model, for sources that need converting (GGUF)."""
    config = {"dtype": workspace.experiment.model.dtype}
    return Recipe("model", VERSION, config, {"source": digest_json(source.identity)})


def convert(workspace: Workspace, source: ModelSource) -> Manifest:
    """Write the model once as safetensors with its tokenizer and template."""

    def build(scratch: Path) -> Built:
        folder = scratch / "policy"
        split = materialise(source, workspace.experiment.model.dtype, folder)
        return folder_files(folder), {"source": source.identity, **split}

    return workspace.make(recipe(workspace, source), build)


def reference(workspace: Workspace, source: ModelSource) -> Policy | None:
    """The reference policy, or None while its conversion is still to be done."""
    if source.kind == "hub":
        located = cache(lambda: source.directory)
        return Policy(
            digest_json(source.identity), located, reads_clock=source.reads_clock, special=source.special
        )
    if not source.needs_materialising:
        return at(source.directory)
    manifest = workspace.artifacts.find(recipe(workspace, source))
    return None if manifest is None else stored(workspace, manifest)


def stored(workspace: Workspace, manifest: Manifest, start: Policy | None = None) -> Policy:
    """The policy of a model or train artifact. start : the one that training started from."""
    policy = at(workspace.artifacts.folder(manifest, "policy"))
    adapted = f"policy/{ADAPTER}/adapter_config.json" in manifest.files
    return replace(policy, start=start, adapted=adapted, made=None if start is None else manifest)


def at(directory: Path) -> Policy:
    """The policy of a local directory."""
    return Policy(
        policy_digest(directory),
        lambda: directory,
        reads_clock=folder_reads_clock(directory),
        special=special_tokens(directory),
    )


def rendering(workspace: Workspace, policy: Policy) -> dict[str, Any]:
    """What decides how a policy's template writes conversations, beside the policy; for recipes, JSON-ready.

    Empty where nothing does: then the recipe is as if there were no such setting.
    """
    found: dict[str, Any] = {"date": workspace.day} if policy.reads_clock else {}
    if variables := workspace.experiment.model.chat_template_kwargs:
        found["chat_template_kwargs"] = variables
    return found


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """The files below a folder, named with the folder's own name first."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in files}
