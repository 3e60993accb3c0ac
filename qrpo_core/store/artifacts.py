"""Whole artifacts: a recipe's files under one manifest, whose conditional creation makes them real.

Layout: ``artifacts/<step>/<key>/manifest.json`` names the files of ``artifacts/<step>/<key>/<digest>/``,
a folder named by their content, so that two writers never touch each other's files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qrpo_core import __version__
from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import canonical_json, digest_bytes, digest_file, digest_json
from qrpo_core.common.local_copies import make_room, mark, written
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.manifest import FORMAT, MAKE_AGAIN, Manifest, parse_manifest
from qrpo_core.store.quarantine import quarantine
from qrpo_core.store.recipe import Recipe
from qrpo_core.store.verification import Check, Verify, is_checked, object_digest


class ArtifactStore:
    """Finds, commits and opens artifacts on a back end.

    verify : how many files are compared with their digest when this process first opens them.
    """

    def __init__(self, objects: Objects, verify: Verify = "always") -> None:
        self.objects = objects
        self.check_on_read: Verify = verify
        self._verified: set[str] = set()  # local paths of the files that match their digest

    def find(self, recipe: Recipe) -> Manifest | None:
        """The committed manifest of a recipe, or None."""
        try:
            data = self.objects.read(f"{recipe.path}/manifest.json")
        except MissingError:
            return None
        return parse_manifest(data, f"{self.objects.url}/{recipe.path}/manifest.json")

    def get(self, recipe: Recipe) -> Manifest:
        """The committed manifest of a recipe; MissingError names the step that has to run."""
        manifest = self.find(recipe)
        if manifest is None:
            raise MissingError(
                f"no {recipe.step} artifact yet",
                where=f"{self.objects.url}/{recipe.path}",
                remedy="run the step before (qrpo plan shows what is missing, qrpo runs what is there)",
            )
        return manifest

    def recipes(self, step: str) -> list[dict[str, Any]]:
        """Every recipe that has an artifact of a step, as its `to_dict`."""
        return [manifest.recipe for manifest in self.manifests(step)]

    def manifests(self, step: str | None = None) -> Iterator[Manifest]:
        """Every artifact (of a step), by path; at the end DamagedError if some are unreadable."""
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
                remedy=MAKE_AGAIN,
            )

    def check_manifests(self, step: str | None = None) -> Iterator[Check]:
        """The check of every manifest (of a step), by path: readable or not."""
        for entry in self.objects.entries(f"artifacts/{step}/" if step else "artifacts/"):
            if not entry.key.endswith("/manifest.json") or entry.key.count("/") != 3:
                continue
            try:
                manifest = parse_manifest(self.objects.read(entry.key), f"{self.objects.url}/{entry.key}")
                yield Check(entry.key, 0, entry.size, "", manifest)
            except MissingError:
                continue  # removed since it was listed
            except DamagedError as error:
                yield Check(entry.key, 0, entry.size, error.message, None)

    def verify(self, manifest: Manifest) -> Iterator[Check]:
        """Compare every file of an artifact with its digest, as read now. Changes nothing."""
        for name, entry in manifest.files.items():
            key = manifest.path(name)
            try:
                damage = (
                    "" if object_digest(self.objects, key) == entry["digest"] else "content and digest differ"
                )
            except MissingError:
                damage = "the file is gone"
            yield Check(key, 0, entry["bytes"], damage, manifest)

    def quarantine(self, manifest: Manifest | str, why: str) -> str:
        """Take an artifact's manifest away, so that it is made again; its files stay for inspection.

        manifest : or the object key of an unreadable manifest.
        Returns the object key of the record (``quarantine/<step>/<key>/manifest.json``), "" if it is gone.
        """
        entry = manifest if isinstance(manifest, str) else manifest.manifest_key

        def is_same(content: bytes) -> bool:
            try:
                found = parse_manifest(content, entry)
            except DamagedError:
                return True
            return found == manifest

        return quarantine(self.objects, entry, why, is_same)

    def commit(
        self, recipe: Recipe, files: Mapping[str, Path | bytes], facts: dict[str, Any], seconds: float
    ) -> Manifest:
        """Store files, make them real in one conditional step and return the committed manifest.

        The loser of a race gets the winner's manifest.

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
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(seconds, 3),
            "code": __version__,
        }
        created = self.objects.put_if_absent(
            f"{recipe.path}/manifest.json", canonical_json(manifest).encode()
        )
        winner = self.get(recipe)
        if not created and winner.exact and facts.get("exact") is True and winner.files != entries:
            names = sorted(
                name
                for name in winner.files.keys() | entries.keys()
                if winner.files.get(name) != entries.get(name)
            )
            raise StoreError(
                "the artifact has two results, though its step declares that it is exact: folder "
                f"{winner.folder} (by qrpo {winner.code}) is committed, folder {folder} was made now; the "
                f"first file that differs is {names[0]}",
                where=f"{self.objects.url}/{recipe.path}",
                remedy="compare the machines and versions that made them; neither was removed",
            )
        return winner

    def read(self, manifest: Manifest, name: str) -> bytes:
        """One file's bytes, compared with the manifest; DamagedError if they differ or are missing."""
        key, entry = manifest.path(name), manifest.files[name]
        try:
            data = self.objects.read(key)
        except MissingError:
            raise _damaged("the file is gone", f"{self.objects.url}/{key}") from None
        checked = is_checked(self.check_on_read, entry["digest"])
        if len(data) != entry["bytes"] or (checked and digest_bytes(data) != entry["digest"]):
            raise _damaged("content and digest differ", f"{self.objects.url}/{key}")
        return data

    def folder(self, manifest: Manifest, name: str, *, but: Sequence[str] = ()) -> Path:
        """A local directory with the artifact's files below `name`; downloaded and checked once if remote.

        but : patterns of names of files that are neither downloaded nor checked now.
        """
        inside = [
            file
            for file in manifest.files
            if file.startswith(f"{name}/") and not any(fnmatch(file, pattern) for pattern in but)
        ]
        if not inside:
            raise MissingError(f"artifact {manifest.step}/{manifest.key} has no folder {name!r}")
        files = [self.file(manifest, file) for file in inside]
        depth = inside[0].removeprefix(f"{name}/").count("/")
        return files[0].parents[depth]

    def file(self, manifest: Manifest, name: str) -> Path:
        """A local path of one of the files; downloaded once if the store is remote.

        The file is compared with the manifest when this process first opens it; DamagedError if they differ.
        """
        key, entry = manifest.path(name), manifest.files[name]
        target = self.objects.local(key) or self._downloaded(manifest, name)
        where = str(target)
        if not target.is_file():
            raise _damaged("the file is gone", where)
        if target.stat().st_size != entry["bytes"]:
            raise _damaged(f"{target.stat().st_size} bytes instead of {entry['bytes']}", where)
        if where not in self._verified and is_checked(self.check_on_read, entry["digest"]):
            if digest_file(target) != entry["digest"]:
                raise _damaged("content and digest differ", where)
            self._verified.add(where)
        return target

    def _downloaded(self, manifest: Manifest, name: str) -> Path:
        """The file's copy in the cache. It appears by a rename after its check: always complete."""
        key, entry = manifest.path(name), manifest.files[name]
        folder = cache_directory() / "artifacts" / f"{manifest.key}-{manifest.folder}"
        target = folder / name
        with written("a copy to the cache", folder):
            mark(folder)
            if target.is_file() and target.stat().st_size == entry["bytes"]:
                return target
            make_room(entry["bytes"])
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
        self._verified.add(str(target))
        return target


def _entry(content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"digest": digest_bytes(content), "bytes": len(content)}
    return {"digest": digest_file(content), "bytes": content.stat().st_size}


def _damaged(why: str, where: str) -> DamagedError:
    return DamagedError(why, where=where, remedy=MAKE_AGAIN)
