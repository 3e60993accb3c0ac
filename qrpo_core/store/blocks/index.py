"""Which blocks are committed: by a listing, and by what this process knows beyond it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.store.backends.interface import Entry, Objects
from qrpo_core.store.blocks.manifest import TRIAL, BlockManifest, from_json
from qrpo_core.store.blocks.planning import BlockPlan
from qrpo_core.store.quarantine import quarantine
from qrpo_core.store.recipe import Recipe

_THREADS = 16
_BATCH = 64  # unparsed manifests in memory
#: Newest blocks that a rate is measured over.
_RECENT = 20
#: Newest blocks of a recipe whose manifests are announced.
_ANNOUNCED = 64

_logger = logging.getLogger("qrpo.store")


def announced_in(recipe: Recipe) -> str:
    """The object key of the announcements of a recipe's newest blocks."""
    return f"{recipe.blocks_path}/announced.json"


class BlockIndex:
    """The manifests of a back end's blocks, each read once: they are immutable.

    A listing may lag behind. Blocks that this process has committed or found by key count even if the listing
    lacks them, and so do those that a run has announced in ``announced.json`` beside them: they are looked
    up by key, which no store answers late.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._known: dict[str, BlockManifest] = {}
        self._confirmed: set[str] = set()

    def stream(self, recipe: Recipe, besides: Set[str] = frozenset()) -> Iterator[BlockManifest]:
        """Every committed block of a recipe, by block id, as soon as it is read.

        An unreadable manifest is quarantined. besides : object keys of manifests to leave out.
        """
        listed = self.listed(recipe)
        unlisted = sorted(entry for entry in self._unlisted(recipe, listed) if self.objects.exists(entry))
        self._confirmed.difference_update(listed)
        yield from self._load_all(sorted({*listed, *unlisted} - besides))

    def listed(self, recipe: Recipe) -> list[str]:
        """The object keys of a recipe's manifests in a listing, sorted."""
        return list(self.objects.keys(f"{recipe.blocks_path}/index/"))

    def find(self, plan: BlockPlan) -> BlockManifest | None:
        """The manifest of exactly the plan's rows, looked up by key; None if there is none."""
        try:
            self._known[plan.manifest_key] = self.read(plan.manifest_key)
        except MissingError:
            self.forget(plan.manifest_key)
            return None
        except DamagedError as error:
            self.quarantine(plan.manifest_key, error.message)
            return None
        self._confirmed.add(plan.manifest_key)
        return self._known[plan.manifest_key]

    def add(self, manifest: BlockManifest) -> None:
        """Remember a block that this process has just committed."""
        self._known[manifest.manifest_key] = manifest
        self._confirmed.add(manifest.manifest_key)

    def announce(self, recipe: Recipe, entry: str) -> None:
        """Name a manifest that is about to be created, for runs whose listings lag.

        A hint: of two runs that announce at the same moment, one may overwrite the other's.
        """
        own = (each for each in self._confirmed if each.startswith(f"{recipe.blocks_path}/index/"))
        entries = dict.fromkeys((*self._announced(recipe), *own, entry))
        content = json.dumps(list(entries)[-_ANNOUNCED:]).encode()
        self.objects.write(announced_in(recipe), content)

    def forget(self, entry: str) -> None:
        """Read this manifest again next time."""
        self._known.pop(entry, None)
        self._confirmed.discard(entry)

    def read(self, entry: str) -> BlockManifest:
        """The manifest under an object key; MissingError if none is there, DamagedError if unreadable."""
        return from_json(self.objects.read(entry), entry, f"{self.objects.url}/{entry}")

    def is_current(self, block: BlockManifest) -> bool:
        """Whether the block is still committed, looked up by key; if not, it is forgotten."""
        try:
            current = self.read(block.manifest_key) == block
        except (MissingError, DamagedError):
            current = False
        if not current:
            self.forget(block.manifest_key)
        return current

    def quarantine(self, block: BlockManifest | str, why: str) -> str:
        """Take a block (or the key of an unreadable manifest) out of the index; returns the new key."""
        entry = block if isinstance(block, str) else block.manifest_key

        def is_same(content: bytes) -> bool:
            try:
                found = from_json(content, entry, entry)
            except DamagedError:
                return True
            return found == block

        self.forget(entry)
        return quarantine(self.objects, entry, why, is_same)

    def remove(self, block: BlockManifest) -> None:
        """Delete a block whose rows are in another one from the index."""
        self.objects.delete(block.manifest_key)
        self.forget(block.manifest_key)

    def recipes(self, prefix: str) -> list[Recipe]:
        """Every recipe that has blocks below a folder, by path; DamagedError names an unreadable one."""
        entries = [key for key in self.objects.keys(prefix) if key.endswith("/recipe.json")]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._recipe, entries))

    def measured(self, recipe: Recipe) -> float | None:
        """Rows a second over the newest blocks of a recipe; None without blocks."""
        folder = f"{recipe.blocks_path}/index/"
        known = [block for entry, block in list(self._known.items()) if entry.startswith(folder)]
        newest = sorted(known, key=lambda block: block.created)[-_RECENT:]
        return _rate(newest or self._newest(self.objects.entries(folder)))

    def measured_step(self, step: str) -> float | None:
        """Rows a second over the newest blocks of a step, of any recipe; None without blocks."""
        entries = self.objects.entries(f"blocks/{step}/")
        return _rate(self._newest(entry for entry in entries if "/index/" in entry.key))

    def _newest(self, entries: Iterable[Entry]) -> list[BlockManifest]:
        newest = sorted(entries, key=lambda entry: entry.modified)[-_RECENT:]
        return list(self._load_all([entry.key for entry in newest]))

    def _unlisted(self, recipe: Recipe, listed: list[str]) -> set[str]:
        folder = f"{recipe.blocks_path}/index/"
        known = {*self._confirmed, *self._announced(recipe)}
        return {entry for entry in known if entry.startswith(folder)}.difference(listed)

    def _announced(self, recipe: Recipe) -> list[str]:
        """The object keys of the manifests that runs announced last; whether each was created is not said."""
        try:
            return [
                each for each in json.loads(self.objects.read(announced_in(recipe))) if isinstance(each, str)
            ]
        except (MissingError, ValueError, TypeError):  # none yet, or damaged: a hint
            return []

    def _load_all(self, entries: list[str]) -> Iterator[BlockManifest]:
        """The manifests of these keys, in their order; those new to this process are read in parallel."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(entries), _BATCH):
                batch = entries[first : first + _BATCH]
                new = dict.fromkeys(entry for entry in batch if entry not in self._known)
                contents = pool.map(self._content, new)
                for entry in batch:
                    if entry in new:  # parsed here: threads do not speed up parsing
                        self._learn(entry, next(contents))
                    if entry in self._known:
                        yield self._known[entry]

    def _content(self, entry: str) -> bytes | None:
        try:
            return self.objects.read(entry)
        except MissingError:
            return None  # compacted or quarantined since it was listed

    def _learn(self, entry: str, content: bytes | None) -> None:
        if content is None:
            return
        try:
            self._known[entry] = from_json(content, entry, f"{self.objects.url}/{entry}")
        except DamagedError as error:
            try:
                self.quarantine(entry, error.message)
            except StoreError as failure:  # a read-only store can still be planned on
                _logger.warning("Left out %s/%s: %s; %s", self.objects.url, entry, error, failure)

    def _recipe(self, entry: str) -> Recipe:
        try:
            raw: dict[str, Any] = json.loads(self.objects.read(entry))
            recipe = Recipe.from_dict(raw)
            if f"{recipe.blocks_path}/recipe.json" != entry:
                raise ValueError("its name does not fit it")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"unreadable recipe: {error}",
                where=f"{self.objects.url}/{entry}",
                remedy="delete it; the recipe's next block writes it again",
            ) from None
        return recipe


def _rate(blocks: list[BlockManifest]) -> float | None:
    blocks = [block for block in blocks if block.facts.get(TRIAL) is not True]
    seconds = sum(block.seconds for block in blocks)
    return sum(block.rows for block in blocks) / max(seconds, 1e-3) if blocks else None
