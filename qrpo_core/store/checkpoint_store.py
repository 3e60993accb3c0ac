"""Checkpoints of a training in the store, from which another machine goes on.

Layout: ``checkpoints/train/<key>/recipe.json`` says what is trained. The files of a checkpoint lie in
``checkpoints/train/<key>/<step>-<random>/``, a folder that one writer alone uses. Its marker, created last,
lists them with sizes and digests; without a marker it is unfinished.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.common.hashing import canonical_json, digest_file
from qrpo_core.common.local_copies import written
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.verification import Check, object_digest

#: The file that marks a checkpoint as complete, on a disk and in the store.
MARKER = "complete.json"
#: Complete checkpoints that are kept: the second is used if the first is damaged.
KEPT = 2
#: The folder of all trainings in the store, and the file that names one.
FOLDER, RECIPE = "checkpoints", "recipe.json"

_logger = logging.getLogger("qrpo.train")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint in the store.

    folder : key of its folder. files : name → [bytes, digest]. facts : see `training.checkpoints`.
    """

    folder: str
    step: int
    files: dict[str, tuple[int, str]]
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one training.

    recipe : of the training (`pipeline.training.checkpoint_recipe`). Opens the store when it is first used.
    """

    def __init__(self, config: StoreConfig, recipe: Recipe) -> None:
        self.config, self.recipe = config, recipe
        self.folder = f"{FOLDER}/{recipe.step}/{recipe.key}"

    @cached_property
    def objects(self) -> Objects:
        """The store's back end."""
        return open_objects(self.config)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes this again of, in any working directory. Holds no credentials."""
        config = self.config.model_copy(update={"path": self.objects.url})
        return {"config": config.model_dump(mode="json"), "recipe": self.recipe.to_dict()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> CheckpointStore:
        """The inverse of `to_json`."""
        return cls(StoreConfig.model_validate(raw["config"]), Recipe.from_dict(raw["recipe"]))

    def put(self, checkpoint: Path, step: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Store a checkpoint that has its marker; then delete all but the newest `KEPT`.

        A store in a directory of the same file system gets a second name of each file, and no copy.
        stopped : is asked before each file. False if it stopped, or if the store has a later step: another
        machine goes on with this training and is ahead.
        """
        if any(each.step > step for each in self.complete()):
            _logger.warning("the store has a later checkpoint than %s: another machine is ahead", checkpoint)
            return False
        recipe = canonical_json(self.recipe.to_dict()).encode()
        self.objects.put_if_absent(f"{self.folder}/{RECIPE}", recipe)
        folder = f"{self.folder}/{step:08d}-{secrets.token_hex(8)}"
        marker = (checkpoint / MARKER).read_bytes()
        for name in json.loads(marker)["files"]:
            if stopped():
                return False
            self.objects.upload(checkpoint / name, f"{folder}/{name}", unchanging=True)
        self.objects.put_if_absent(f"{folder}/{MARKER}", marker)
        self._delete_older()
        return True

    def complete(self) -> list[StoredCheckpoint]:
        """All complete checkpoints, the newest first; one with an unreadable marker is left out, and said."""
        found = []
        for folder, names in self._folders().items():
            if MARKER not in names:
                continue
            try:
                found.append(_parse(folder, self.objects.read(f"{folder}/{MARKER}")))
            except MissingError:
                continue  # deleted since it was listed
            except DamagedError as error:
                _logger.warning("%s is not used: %s", folder, error.message)
        return sorted(found, key=lambda each: (each.step, each.folder), reverse=True)

    def get(self, stored: StoredCheckpoint, target: Path) -> None:
        """Download into a new folder, marker last.

        Raises DamagedError if a file differs from the marker, MissingError if it is gone, StoreError if the
        disk is full.
        """
        names = {**stored.files, MARKER: None}
        for name, entry in names.items():
            path, key = target / name, f"{stored.folder}/{name}"
            with written("the checkpoint", target):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.objects.download(key, path)
                if entry is not None and (path.stat().st_size, digest_file(path)) != entry:
                    raise DamagedError("content and digest differ", where=f"{self.objects.url}/{key}")

    def discard(self, stored: StoredCheckpoint) -> None:
        """Take a damaged checkpoint's marker away; its files go with those of the older ones."""
        self.objects.delete(f"{stored.folder}/{MARKER}")

    def check(self) -> Iterator[Check]:
        """Compare every file of the complete checkpoints with its digest, as read now. Changes nothing."""
        for each in self.complete():
            for name, (size, digest) in each.files.items():
                key = f"{each.folder}/{name}"
                try:
                    same = object_digest(self.objects, key) == digest
                    damage = "" if same else "content and digest differ"
                except MissingError:
                    damage = "the file is gone"
                yield Check(key, 0, size, damage, None)

    def delete(self) -> None:
        """Delete every checkpoint of a training that is finished; the markers first."""
        keys = list(self.objects.keys(f"{self.folder}/"))
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MARKER}")):
            self.objects.delete(key)

    def _delete_older(self) -> None:
        """Delete all but the newest, and unfinished folders older than those: nobody writes there now."""
        kept = [each.folder for each in self.complete()[:KEPT]]
        for folder, names in self._folders().items():
            if folder not in kept and (MARKER in names or folder < min(kept, default="")):
                for name in sorted(names, key=lambda name: name != MARKER):
                    self.objects.delete(f"{folder}/{name}")

    def _folders(self) -> dict[str, list[str]]:
        """The folder of each checkpoint, unfinished ones included, and the names in it."""
        found: dict[str, list[str]] = {}
        for key in self.objects.keys(f"{self.folder}/"):
            folder, _, name = key.removeprefix(f"{self.folder}/").partition("/")
            if name:
                found.setdefault(f"{self.folder}/{folder}", []).append(name)
        return found


def stored_trainings(objects: Objects) -> Iterator[Recipe]:
    """The recipe of every training that has checkpoints in the store."""
    for key in objects.keys(f"{FOLDER}/"):
        if key.endswith(f"/{RECIPE}") and key.count("/") == 3:
            try:
                yield Recipe.from_dict(json.loads(objects.read(key)))
            except MissingError:
                continue  # deleted since it was listed
            except (ValueError, KeyError, TypeError):
                raise DamagedError(
                    "no recipe of a training", where=f"{objects.url}/{key}", remedy="delete its folder"
                ) from None


def _parse(folder: str, data: bytes) -> StoredCheckpoint:
    try:
        marker = json.loads(data)
        files = {name: (int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        step = int(folder.rpartition("/")[2].partition("-")[0])
        return StoredCheckpoint(folder, step, files, dict(marker["facts"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MARKER} cannot be read ({error!r})", where=f"{folder}/{MARKER}") from None
