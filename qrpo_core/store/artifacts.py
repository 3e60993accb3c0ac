"""Whole artifacts: a recipe's files under one manifest, whose conditional creation makes them real.

Layout: ``artifacts/<step>/<key>/manifest.json`` names the files of ``artifacts/<step>/<key>/<digest>/``,
a folder named by their content, so that two writers never touch each other's files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qrpo_core import __version__
from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.ids import canonical_json, digest_bytes, digest_file, digest_json
from qrpo_core.store.objects import Objects
from qrpo_core.store.recipe import Recipe

FORMAT = 1

_MAKE_AGAIN = "delete the artifact's folder; it is made again"


@dataclass(frozen=True)
class Manifest:
    """What is stored under a recipe.

    files : name → sha256 and size in bytes.
    facts : what the step wants remembered (counts, rates, diagnostics), JSON-ready.
    """

    step: str
    key: str
    recipe: dict[str, Any]
    folder: str
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    created: str
    seconds: float
    code: str

    @property
    def digest(self) -> str:
        """Digest of the content: every file's name and digest."""
        return digest_json({name: entry["digest"] for name, entry in self.files.items()})

    def path(self, name: str) -> str:
        """Key of one of the files."""
        if name not in self.files:
            raise MissingError(
                f"artifact {self.step}/{self.key} has no file {name!r}", remedy=f"it has {sorted(self.files)}"
            )
        return f"artifacts/{self.step}/{self.key}/{self.folder}/{name}"


class Artifacts:
    """Finds, commits and opens artifacts on a back end."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def find(self, recipe: Recipe) -> Manifest | None:
        """The committed manifest of a recipe, or None."""
        try:
            data = self.objects.read(f"{recipe.path}/manifest.json")
        except MissingError:
            return None
        return _parse(data, f"{self.objects.url}/{recipe.path}/manifest.json")

    def get(self, recipe: Recipe) -> Manifest:
        """The committed manifest of a recipe; MissingError names the step that has to run."""
        manifest = self.find(recipe)
        if manifest is None:
            raise MissingError(
                f"no {recipe.step} artifact yet",
                where=f"{self.objects.url}/{recipe.path}",
                remedy="run the step before",
            )
        return manifest

    def recipes(self, step: str) -> list[dict[str, Any]]:
        """Every recipe that has an artifact of a step, as its `to_dict`."""
        keys = [key for key in self.objects.keys(f"artifacts/{step}/") if key.endswith("/manifest.json")]
        return [_parse(self.objects.read(key), f"{self.objects.url}/{key}").recipe for key in keys]

    def commit(
        self, recipe: Recipe, files: Mapping[str, Path | bytes], facts: dict[str, Any], seconds: float
    ) -> Manifest:
        """Store files and make them real in one conditional step; the loser of a race gets the winner's.

        files : name (may hold slashes) → local path or bytes.
        """
        entries = {name: _entry(content) for name, content in sorted(files.items())}
        folder = digest_json({name: entry["digest"] for name, entry in entries.items()})[:16]
        for name, content in files.items():
            key = f"{recipe.path}/{folder}/{name}"
            if isinstance(content, bytes):
                self.objects.write(key, content)
            else:
                self.objects.upload(content, key)
        manifest = {
            "format": FORMAT,
            "step": recipe.step,
            "key": recipe.key,
            "recipe": recipe.to_dict(),
            "folder": folder,
            "files": entries,
            "facts": facts,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "code": __version__,
        }
        self.objects.create(f"{recipe.path}/manifest.json", canonical_json(manifest).encode())
        return self.get(recipe)

    def read(self, manifest: Manifest, name: str) -> bytes:
        """One file's bytes, checked against the manifest; DamagedError if they differ."""
        data = self.objects.read(manifest.path(name))
        if digest_bytes(data) != manifest.files[name]["digest"]:
            raise _damaged(f"{self.objects.url}/{manifest.path(name)}")
        return data

    def folder(self, manifest: Manifest, name: str) -> Path:
        """A local directory with the artifact's files below `name`; downloaded and checked once if remote."""
        inside = [file for file in manifest.files if file.startswith(f"{name}/")]
        if not inside:
            raise MissingError(f"artifact {manifest.step}/{manifest.key} has no folder {name!r}")
        files = [self.file(manifest, file) for file in inside]
        depth = inside[0].removeprefix(f"{name}/").count("/")
        return files[0].parents[depth]

    def file(self, manifest: Manifest, name: str) -> Path:
        """A local path of one of the files; downloaded and checked once if the store is remote."""
        key, entry = manifest.path(name), manifest.files[name]
        local = self.objects.local(key)
        if local is not None:
            if not local.is_file():
                raise MissingError("a file of an artifact is gone", where=str(local), remedy=_MAKE_AGAIN)
            return local
        folder = cache_directory() / "artifacts" / f"{manifest.key}-{manifest.folder}"
        target = folder / name
        if target.is_file() and target.stat().st_size == entry["bytes"]:
            return target  # complete by construction: a download is renamed into place after its check
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / "part"
            self.objects.download(key, part)
            if digest_file(part) != entry["digest"]:
                raise _damaged(f"{self.objects.url}/{key}")
            os.replace(part, target)
        return target


def cache_directory() -> Path:
    """Where copies that can be fetched or computed again live: $QRPO_CACHE, else the user's cache."""
    given = os.environ.get("QRPO_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrpo"


def _entry(content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"digest": digest_bytes(content), "bytes": len(content)}
    return {"digest": digest_file(content), "bytes": content.stat().st_size}


def _parse(data: bytes, where: str) -> Manifest:
    try:
        raw = json.loads(data)
        if raw.pop("format") != FORMAT:
            raise StoreError("manifest of another format", where=where, remedy="upgrade qrpo")
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"unreadable manifest: {error}", where=where, remedy="delete its folder; it is made again"
        ) from None


def _damaged(where: str) -> DamagedError:
    return DamagedError("content and digest differ", where=where, remedy=_MAKE_AGAIN)
