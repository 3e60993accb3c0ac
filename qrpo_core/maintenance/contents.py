"""The objects of a store, by recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Literal, get_args

from qrpo_core.store.backends.interface import Entry, Objects
from qrpo_core.store.checkpoint_store import MARKER

#: What a recipe has objects of: results, and checkpoints of its training.
Kind = Literal["artifacts", "blocks", "checkpoints"]
_KINDS: tuple[Kind, ...] = get_args(Kind)

#: Folders of the store without recipes.
LOOSE = ("quarantine", "budgets", "inputs", "presets", "probe", "tmp")


@dataclass(frozen=True)
class RecipeObjects:
    """The objects that are stored under one recipe. `entries` are sorted by key."""

    kind: Kind
    step: str
    key: str
    entries: tuple[Entry, ...]

    @property
    def path(self) -> str:
        """Folder of the objects."""
        return f"{self.kind}/{self.step}/{self.key}"

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return total_bytes(self.entries)

    @property
    def modified(self) -> datetime:
        """Time of the last write, by the back end's clock."""
        return max(entry.modified for entry in self.entries)

    @property
    def manifests(self) -> tuple[Entry, ...]:
        """The artifact's manifest, the manifests of the blocks, or the markers of the checkpoints."""
        if self.kind == "checkpoints":
            return tuple(entry for entry in self.entries if entry.key.endswith(f"/{MARKER}"))
        start = f"{self.path}/" + ("manifest.json" if self.kind == "artifacts" else "index/")
        return tuple(entry for entry in self.entries if entry.key.startswith(start))


@dataclass(frozen=True)
class StoreListing:
    """A whole store. loose : the objects of each folder in `LOOSE`."""

    recipes: tuple[RecipeObjects, ...]
    loose: dict[str, tuple[Entry, ...]]

    @property
    def objects(self) -> int:
        """Number of all objects."""
        return sum(len(each.entries) for each in self.recipes) + sum(map(len, self.loose.values()))

    @property
    def bytes(self) -> int:
        """Size of all objects."""
        return sum(each.bytes for each in self.recipes) + sum(map(total_bytes, self.loose.values()))


def list_store(objects: Objects) -> StoreListing:
    """List a store; folders that are not the store's are left out."""
    return StoreListing(
        tuple(chain.from_iterable(objects_by_recipe(objects, kind) for kind in _KINDS)),
        {folder: tuple(objects.entries(f"{folder}/")) for folder in LOOSE},
    )


def objects_by_recipe(objects: Objects, kind: Kind) -> Iterator[RecipeObjects]:
    """The objects of every recipe of one kind, by step and key."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in objects.entries(f"{kind}/"):
        parts = entry.key.split("/", 3)
        if len(parts) == 4:
            found.setdefault((parts[1], parts[2]), []).append(entry)
    for (step, key), entries in sorted(found.items()):
        yield RecipeObjects(kind, step, key, tuple(entries))


def total_bytes(entries: Iterable[Entry]) -> int:
    """The sum of the sizes."""
    return sum(entry.size for entry in entries)
