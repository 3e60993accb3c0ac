"""The manifest of an artifact: its files and the recipe that they were made by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import digest_json

FORMAT = 2

MAKE_AGAIN = "qrpo verify --repair quarantines the artifact; the next run makes it again"


@dataclass(frozen=True)
class Manifest:
    """The artifact that is stored under a recipe.

    files : name → sha256 and size in bytes.
    facts : counts, rates and diagnostics that the step records, JSON-ready.
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
        """The digest of all names and contents."""
        return digest_json({name: entry["digest"] for name, entry in self.files.items()})

    @property
    def manifest_key(self) -> str:
        """Object key of the manifest itself."""
        return f"artifacts/{self.step}/{self.key}/manifest.json"

    @property
    def exact(self) -> bool:
        """Whether the step declares that its result is the same wherever it is made."""
        return self.facts.get("exact") is True

    def path(self, name: str) -> str:
        """Object key of one of the files."""
        if name not in self.files:
            raise MissingError(
                f"artifact {self.step}/{self.key} has no file {name!r}", remedy=f"it has {sorted(self.files)}"
            )
        return f"artifacts/{self.step}/{self.key}/{self.folder}/{name}"


def check_format(found: object, known: int, where: str) -> None:
    """Raise StoreError for a manifest of another format than the `known` one of this version."""
    if found == known:
        return
    if isinstance(found, int) and found < known:
        remedy = "set store.path to a new place, or delete this store"
    else:
        remedy = "upgrade qrpo"
    raise StoreError(
        f"another version of qrpo wrote this store: manifest of format {found!r}, here {known}",
        where=where,
        remedy=remedy,
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A stored manifest; DamagedError if it is unreadable, StoreError if it has another format."""
    try:
        raw = json.loads(data)
        check_format(raw.pop("format"), FORMAT, where)
        manifest = Manifest(**raw)
        if digest_json(manifest.recipe) != manifest.key:
            raise ValueError("its name does not fit its recipe")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"unreadable manifest: {error}", where=where, remedy=MAKE_AGAIN) from None
