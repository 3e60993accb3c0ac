"""Files that travel through the store by their content, so that a machine elsewhere reads the same.

Layout: ``inputs/<digest>/<name>``. The digest is that of all names and contents of the folder, so equal files
are stored once and a changed file has another folder. The address ``store:inputs/<digest>/<name>`` names a
file in the experiment's own store.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.common.file_digests import file_digests
from qrpo_core.common.hashing import digest_json
from qrpo_core.common.local_copies import PART, Hold, make_room, mark, written
from qrpo_core.store.backends.interface import Objects

#: How the address of a stored file begins.
SCHEME = "store:"
#: The folder of the store.
FOLDER = "inputs"
#: Copies of this process's inputs, which a run reads whenever it likes.
_held: dict[Path, Hold] = {}
_KEY = re.compile(rf"{FOLDER}/[0-9a-f]{{32}}/.")


def address_of(files: Mapping[str, Path]) -> str:
    """The address of the folder of these files, by their names and contents.

    files : name in the folder (may hold slashes) → local path.
    """
    return f"{SCHEME}{FOLDER}/{_digest(files)}"


def put(objects: Objects, files: Mapping[str, Path]) -> str:
    """Store files as one folder; returns its address. files : as for `address_of`."""
    address = address_of(files)
    for name, path in files.items():
        objects.upload(path, f"{address.removeprefix(SCHEME)}/{name}")  # also over a damaged one
    return address


def fetch(objects: Objects, address: str) -> Path:
    """A local path of a stored file; its folder is downloaded once if the store is remote.

    Raises MissingError where this store has no such file, DamagedError where the folder's content has not the
    digest of its name.
    """
    key = address.removeprefix(SCHEME)
    folder = "/".join(key.split("/")[:2])
    if not _KEY.match(key) or key not in (keys := list(objects.keys(f"{folder}/"))):
        raise MissingError(
            "the store has no such input",
            where=f"{objects.url}/{key}",
            remedy="workers need the store of the submission: s3://, or a folder that they share",
        )
    local = objects.local(folder)
    if local is None:
        return _downloaded(objects, folder, keys) / key.removeprefix(f"{folder}/")
    _check(objects, folder, keys, local)
    return local / key.removeprefix(f"{folder}/")


def _downloaded(objects: Objects, folder: str, keys: list[str]) -> Path:
    """The folder's copy in the cache. It appears by a rename after its check: always complete."""
    target = cache_directory() / folder
    with written("a copy to the cache", target):
        if target not in _held:
            mark(target)
            _held[target] = Hold(target)
        if target.is_dir():
            return target
        make_room(sum(entry.size for entry in objects.entries(f"{folder}/")))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(PART, f"{target.name}.", target.parent) as scratch:
            copy = Path(scratch) / "copy"
            for key in keys:
                place = copy / key.removeprefix(f"{folder}/")
                place.parent.mkdir(parents=True, exist_ok=True)
                objects.download(key, place)
            _check(objects, folder, keys, copy)
            with contextlib.suppress(OSError):  # another process was faster
                copy.rename(target)
    return target


def _check(objects: Objects, folder: str, keys: list[str], copy: Path) -> None:
    names = [key.removeprefix(f"{folder}/") for key in keys]
    if _digest({name: copy / name for name in names}) != folder.removeprefix(f"{FOLDER}/"):
        raise DamagedError(
            "the files of an input have another content than when they were submitted",
            where=f"{objects.url}/{folder}",
            remedy="submit the experiment again",
        )


def _digest(files: Mapping[str, Path]) -> str:
    names = sorted(files)
    return digest_json(dict(zip(names, file_digests(files[name] for name in names), strict=True)))
