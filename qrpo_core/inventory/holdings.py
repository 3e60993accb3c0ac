"""What lies in a store, from one listing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from qrpo_core.store.objects import Entry, Objects

#: Folders of the store that hold no results; `artifacts` and `blocks` do.
LOOSE = ("aside", "budgets", "probe", "tmp")


@dataclass(frozen=True)
class Holding:
    """Everything that is stored under one recipe. `entries` by key."""

    kind: Literal["artifacts", "blocks"]
    step: str
    key: str
    entries: tuple[Entry, ...]

    @property
    def path(self) -> str:
        """The folder that holds it."""
        return f"{self.kind}/{self.step}/{self.key}"

    @property
    def bytes(self) -> int:
        """Of all its objects."""
        return total_bytes(self.entries)

    @property
    def modified(self) -> datetime:
        """When it was last written to, by the back end's clock."""
        return max(entry.modified for entry in self.entries)

    @property
    def manifests(self) -> tuple[Entry, ...]:
        """What makes it real: an artifact's manifest, or the index entries of blocks."""
        return tuple(entry for entry in self.entries if self._is_manifest(entry))

    def _is_manifest(self, entry: Entry) -> bool:
        inside = entry.key.removeprefix(f"{self.path}/")
        return inside == "manifest.json" if self.kind == "artifacts" else inside.startswith("index/")


@dataclass(frozen=True)
class Contents:
    """A whole store. loose : the objects of each of the folders `LOOSE`."""

    holdings: tuple[Holding, ...]
    loose: dict[str, tuple[Entry, ...]]

    @property
    def objects(self) -> int:
        """How many there are."""
        return sum(len(each.entries) for each in self.holdings) + sum(map(len, self.loose.values()))

    @property
    def bytes(self) -> int:
        """Of all objects."""
        return sum(each.bytes for each in self.holdings) + sum(map(total_bytes, self.loose.values()))


def contents(objects: Objects) -> Contents:
    """List a store. Folders that are not of its making are not looked at."""
    return Contents(
        (*holdings(objects, "artifacts"), *holdings(objects, "blocks")),
        {folder: tuple(objects.entries(f"{folder}/")) for folder in LOOSE},
    )


def holdings(objects: Objects, kind: Literal["artifacts", "blocks"]) -> Iterator[Holding]:
    """The holdings of one kind, by step and key."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in objects.entries(f"{kind}/"):
        parts = entry.key.split("/", 3)
        if len(parts) == 4:
            found.setdefault((parts[1], parts[2]), []).append(entry)
    for (step, key), entries in sorted(found.items()):
        yield Holding(kind, step, key, tuple(entries))


def total_bytes(entries: Iterable[Entry]) -> int:
    """Their sizes together."""
    return sum(entry.size for entry in entries)
