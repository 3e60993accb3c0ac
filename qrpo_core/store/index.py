"""Which blocks are committed: a listing, and what is known beyond it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.store.aside import set_aside
from qrpo_core.store.block_manifest import TRIAL, BlockManifest, from_json
from qrpo_core.store.interface import Entry, Objects
from qrpo_core.store.planning import BlockPlan
from qrpo_core.store.recipe import Recipe

_THREADS = 16
_BATCH = 64  # manifests in memory as they were read
#: Blocks that a rate is measured over.
_RECENT = 20

_logger = logging.getLogger("qrpo.store")


class BlockIndex:
    """The manifests of a back end's blocks, each read once: they are immutable.

    A listing may lag behind. What this process committed, or was told of by key, stands even where the
    listing does not show it; it is then asked for by key, which no store answers late.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._known: dict[str, BlockManifest] = {}
        self._vouched: set[str] = set()

    def committed(self, recipe: Recipe) -> list[BlockManifest]:
        """Every committed block of a recipe, by block id. A manifest that cannot be read is set aside."""
        return list(self.stream(recipe))

    def stream(self, recipe: Recipe, besides: Set[str] = frozenset()) -> Iterator[BlockManifest]:
        """The same one by one as they arrive, for work that can begin before the last.

        besides : object keys of manifests to leave out.
        """
        listed = self.listed(recipe)
        unlisted = sorted(entry for entry in self._unlisted(recipe, listed) if self.objects.exists(entry))
        self._vouched.difference_update(listed)
        yield from self._load_all(sorted({*listed, *unlisted} - besides))

    def listed(self, recipe: Recipe) -> list[str]:
        """Object keys of a recipe's manifests, as the listing has them, sorted."""
        return list(self.objects.keys(f"{recipe.blocks_path}/index/"))

    def find(self, plan: BlockPlan) -> BlockManifest | None:
        """The manifest of exactly these rows, asked for by key."""
        try:
            self._known[plan.index] = self.read(plan.index)
        except MissingError:
            self.forget(plan.index)
            return None
        except DamagedError as error:
            self.set_aside(plan.index, error.message)
            return None
        self._vouched.add(plan.index)
        return self._known[plan.index]

    def add(self, manifest: BlockManifest) -> None:
        """A block that this process has just committed."""
        self._known[manifest.index] = manifest
        self._vouched.add(manifest.index)

    def forget(self, entry: str) -> None:
        """Ask again next time."""
        self._known.pop(entry, None)
        self._vouched.discard(entry)

    def read(self, entry: str) -> BlockManifest:
        """The manifest under an object key; MissingError if there is none, DamagedError if it is none."""
        return from_json(self.objects.read(entry), entry, f"{self.objects.url}/{entry}")

    def holds(self, block: BlockManifest) -> bool:
        """Whether the block is still the one under its name, asked for by key; if not, it is forgotten."""
        try:
            there = self.read(block.index) == block
        except (MissingError, DamagedError):
            there = False
        if not there:
            self.forget(block.index)
        return there

    def set_aside(self, block: BlockManifest | str, why: str) -> str:
        """Take a block, or an unreadable entry by its object key, out of the index. Returns the new key."""
        entry = block if isinstance(block, str) else block.index

        def judged(content: bytes) -> bool:
            try:
                found = from_json(content, entry, entry)
            except DamagedError:
                return True
            return found == block

        self.forget(entry)
        return set_aside(self.objects, entry, why, judged)

    def remove(self, block: BlockManifest) -> None:
        """Take a block out of the index for good: its rows are in another one."""
        self.objects.delete(block.index)
        self.forget(block.index)

    def recipes(self, prefix: str) -> list[Recipe]:
        """Every recipe that has blocks below a folder, by path; DamagedError names one that is unreadable."""
        entries = [key for key in self.objects.keys(prefix) if key.endswith("/recipe.json")]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._recipe, entries))

    def measured(self, recipe: Recipe) -> float | None:
        """Rows a second over the newest blocks of a recipe; None where there are none."""
        folder = f"{recipe.blocks_path}/index/"
        known = [block for entry, block in list(self._known.items()) if entry.startswith(folder)]
        newest = sorted(known, key=lambda block: block.created)[-_RECENT:]
        return _rate(newest or self._newest(self.objects.entries(folder)))

    def measured_step(self, step: str) -> float | None:
        """Rows a second over the newest blocks of a step, whatever the recipe; None where there are none."""
        entries = self.objects.entries(f"blocks/{step}/")
        return _rate(self._newest(entry for entry in entries if "/index/" in entry.key))

    def _newest(self, entries: Iterable[Entry]) -> list[BlockManifest]:
        newest = sorted(entries, key=lambda entry: entry.modified)[-_RECENT:]
        return list(self._load_all([entry.key for entry in newest]))

    def _unlisted(self, recipe: Recipe, listed: list[str]) -> set[str]:
        folder = f"{recipe.blocks_path}/index/"
        return {entry for entry in self._vouched if entry.startswith(folder)}.difference(listed)

    def _load_all(self, entries: list[str]) -> Iterator[BlockManifest]:
        """The manifests of index entries, in their order; those new to this process are read side by side."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(entries), _BATCH):
                batch = entries[first : first + _BATCH]
                new = dict.fromkeys(entry for entry in batch if entry not in self._known)
                contents = pool.map(self._content, new)
                for entry in batch:
                    if entry in new:  # parsed here: it is work, of which threads do no more
                        self._learn(entry, next(contents))
                    if entry in self._known:
                        yield self._known[entry]

    def _content(self, entry: str) -> bytes | None:
        try:
            return self.objects.read(entry)
        except MissingError:
            return None  # compacted or set aside since it was listed

    def _learn(self, entry: str, content: bytes | None) -> None:
        if content is None:
            return
        try:
            self._known[entry] = from_json(content, entry, f"{self.objects.url}/{entry}")
        except DamagedError as error:
            try:
                self.set_aside(entry, error.message)
            except StoreError as failure:  # a store that may only be read can still be planned on
                _logger.warning("Left out %s/%s: %s; %s", self.objects.url, entry, error, failure)

    def _recipe(self, entry: str) -> Recipe:
        try:
            raw: dict[str, Any] = json.loads(self.objects.read(entry))
            recipe = Recipe.from_dict(raw)
            if f"{recipe.blocks_path}/recipe.json" != entry:
                raise ValueError("its key is another")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"unreadable recipe: {error}",
                where=f"{self.objects.url}/{entry}",
                remedy="delete it; it is written again with the recipe's next block",
            ) from None
        return recipe


def _rate(blocks: list[BlockManifest]) -> float | None:
    blocks = [block for block in blocks if block.facts.get(TRIAL) is not True]
    seconds = sum(block.seconds for block in blocks)
    return sum(block.rows for block in blocks) / max(seconds, 1e-3) if blocks else None
