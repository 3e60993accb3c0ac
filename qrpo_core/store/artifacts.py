"""Whole artifacts: a recipe's files under one manifest, whose conditional creation makes them real.

Layout: ``artifacts/<step>/<key>/manifest.json`` names the files of ``artifacts/<step>/<key>/<digest>/``,
a folder named by their content, so that two writers never touch each other's files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qrpo_core import __version__
from qrpo_core.errors import DamagedError, MissingError, StoreError
from qrpo_core.ids import canonical_json, digest_bytes, digest_file, digest_json
from qrpo_core.store.aside import set_aside
from qrpo_core.store.checks import Check, Verify, is_checked
from qrpo_core.store.interface import Objects
from qrpo_core.store.recipe import Recipe

FORMAT = 1

_MAKE_AGAIN = "qrpo verify --repair sets the artifact aside; the next run makes it again"


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

    @property
    def index(self) -> str:
        """Object key of the manifest itself."""
        return f"artifacts/{self.step}/{self.key}/manifest.json"

    @property
    def exact(self) -> bool:
        """Whether the step declares that its result comes out the same wherever it is made."""
        return self.facts.get("exact") is True

    def path(self, name: str) -> str:
        """Key of one of the files."""
        if name not in self.files:
            raise MissingError(
                f"artifact {self.step}/{self.key} has no file {name!r}", remedy=f"it has {sorted(self.files)}"
            )
        return f"artifacts/{self.step}/{self.key}/{self.folder}/{name}"


class Artifacts:
    """Finds, commits and opens artifacts on a back end.

    verify : whether a file's content is compared with its digest when it is first opened here.
    """

    def __init__(self, objects: Objects, verify: Verify = "always") -> None:
        self.objects = objects
        self.check_on_read: Verify = verify
        self._whole: set[str] = set()  # files that were compared

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
        return [manifest.recipe for manifest in self.manifests(step)]

    def manifests(self, step: str | None = None) -> Iterator[Manifest]:
        """Every artifact (of a step), by path. After the last one DamagedError, if some are unreadable."""
        damaged = []
        for check in self.check_manifests(step):
            if isinstance(check.manifest, Manifest):
                yield check.manifest
            else:
                damaged.append(check)
        if damaged:
            raise DamagedError(
                f"{len(damaged)} artifacts are damaged, the first: {damaged[0].damage}",
                where=f"{self.objects.url}/{damaged[0].key}",
                remedy=_MAKE_AGAIN,
            )

    def check_manifests(self, step: str | None = None) -> Iterator[Check]:
        """One a manifest, by path: the manifest, or why it cannot be read."""
        for entry in self.objects.entries(f"artifacts/{step}/" if step else "artifacts/"):
            if not entry.key.endswith("/manifest.json") or entry.key.count("/") != 3:
                continue
            try:
                manifest = _parse(self.objects.read(entry.key), f"{self.objects.url}/{entry.key}")
                yield Check(entry.key, 0, entry.size, "", manifest)
            except MissingError:
                continue  # removed since it was listed
            except DamagedError as error:
                yield Check(entry.key, 0, entry.size, error.message, None)

    def verify(self, manifest: Manifest) -> Iterator[Check]:
        """Every file of an artifact against its digest, as read now. Changes nothing."""
        for name, entry in manifest.files.items():
            key = manifest.path(name)
            try:
                damage = "" if self._digest(key) == entry["digest"] else "content and digest differ"
            except MissingError:
                damage = "the file is gone"
            yield Check(key, 0, entry["bytes"], damage, manifest)

    def set_aside(self, manifest: Manifest | str, why: str) -> str:
        """Take an artifact's manifest away, so that it is made again; its files stay for inspection.

        manifest : or the object key of a manifest that cannot be read.
        Returns the object key of the record (``aside/<step>/<key>/manifest.json``), "" if it was gone.
        """
        entry = manifest if isinstance(manifest, str) else manifest.index

        def judged(content: bytes) -> bool:
            try:
                found = _parse(content, entry)
            except DamagedError:
                return True
            return found == manifest

        return set_aside(self.objects, entry, why, judged)

    def commit(
        self, recipe: Recipe, files: Mapping[str, Path | bytes], facts: dict[str, Any], seconds: float
    ) -> Manifest:
        """Store files and make them real in one conditional step; the loser of a race gets the winner's.

        files : name (may hold slashes) → local path or bytes.
        With ``exact: True`` in the facts of both, contents that differ are a StoreError that names both.
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
        created = self.objects.create(f"{recipe.path}/manifest.json", canonical_json(manifest).encode())
        winner = self.get(recipe)
        if not created and winner.exact and facts.get("exact") is True and winner.files != entries:
            names = sorted(
                name
                for name in winner.files.keys() | entries.keys()
                if winner.files.get(name) != entries.get(name)
            )
            raise StoreError(
                "the artifact came out in two ways, though its step declares that it cannot: folder "
                f"{winner.folder} (by qrpo {winner.code}) is committed, folder {folder} was made now; the "
                f"first file that differs is {names[0]}",
                where=f"{self.objects.url}/{recipe.path}",
                remedy="compare the machines and versions that made them; neither was removed",
            )
        return winner

    def read(self, manifest: Manifest, name: str) -> bytes:
        """One file's bytes, compared with the manifest; DamagedError if they differ or are gone."""
        key, entry = manifest.path(name), manifest.files[name]
        try:
            data = self.objects.read(key)
        except MissingError:
            raise _damaged("the file is gone", f"{self.objects.url}/{key}") from None
        checked = is_checked(self.check_on_read, entry["digest"])
        if len(data) != entry["bytes"] or (checked and digest_bytes(data) != entry["digest"]):
            raise _damaged("content and digest differ", f"{self.objects.url}/{key}")
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
        """A local path of one of the files; downloaded once if the store is remote.

        It is compared with the manifest when this process opens it first; DamagedError if it is not whole.
        """
        key, entry = manifest.path(name), manifest.files[name]
        target = self.objects.local(key) or self._downloaded(manifest, name)
        where = str(target)
        if not target.is_file():
            raise _damaged("the file is gone", where)
        if target.stat().st_size != entry["bytes"]:
            raise _damaged(f"{target.stat().st_size} bytes instead of {entry['bytes']}", where)
        if where not in self._whole and is_checked(self.check_on_read, entry["digest"]):
            if digest_file(target) != entry["digest"]:
                raise _damaged("content and digest differ", where)
            self._whole.add(where)
        return target

    def _downloaded(self, manifest: Manifest, name: str) -> Path:
        """The file's copy in the cache; complete by construction: renamed into place after its check."""
        key, entry = manifest.path(name), manifest.files[name]
        folder = cache_directory() / "artifacts" / f"{manifest.key}-{manifest.folder}"
        target = folder / name
        if target.is_file() and target.stat().st_size == entry["bytes"]:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / "part"
            try:
                self.objects.download(key, part)
            except MissingError:
                raise _damaged("the file is gone", f"{self.objects.url}/{key}") from None
            if digest_file(part) != entry["digest"]:
                raise _damaged("content and digest differ", f"{self.objects.url}/{key}")
            os.replace(part, target)
        self._whole.add(str(target))
        return target

    def _digest(self, key: str) -> str:
        """Digest of an object as it is in the store now."""
        local = self.objects.local(key)
        if local is not None:
            if not local.is_file():
                raise MissingError("no such object", where=str(local))
            return digest_file(local)
        with tempfile.TemporaryDirectory() as scratch:
            part = Path(scratch) / "part"
            self.objects.download(key, part)
            return digest_file(part)


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
        manifest = Manifest(**raw)
        if digest_json(manifest.recipe) != manifest.key:
            raise ValueError("its recipe is not the one it is named by")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"unreadable manifest: {error}", where=where, remedy=_MAKE_AGAIN) from None


def _damaged(why: str, where: str) -> DamagedError:
    return DamagedError(why, where=where, remedy=_MAKE_AGAIN)
