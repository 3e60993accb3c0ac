"""Digests of large files, cached by path, size and modification time."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import DataError
from qrpo_core.common.hashing import digest_file

#: A file that changed this recently is hashed again next time: another change may leave the same time.
_SETTLED_SECONDS = 2.0


def file_digests(paths: Iterable[Path]) -> list[str]:
    """The sha256 of each file, cached by resolved path, size and modification time.

    Raises DataError for one that cannot be read.
    """
    cache = cache_directory() / "digests.json"
    known = _read(cache)
    fresh: dict[str, list[Any]] = {}
    digests = []
    for path in paths:
        try:
            real = path.resolve()
            status = real.stat()
            match known.get(str(real)):
                case [status.st_size, status.st_mtime_ns, digest]:
                    digests.append(str(digest))
                    continue
            digests.append(digest_file(real))
        except OSError as error:
            problem = f"the file cannot be read: {error.strerror}"
            raise DataError(problem, where=str(path), remedy="make it readable for this user") from error
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            fresh[str(real)] = [status.st_size, status.st_mtime_ns, digests[-1]]
    if fresh:
        _write(cache, _read(cache) | fresh)
    return digests


def _read(cache: Path) -> dict[str, Any]:
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent or damaged: its content can be computed again
    return value if isinstance(value, dict) else {}


def _write(cache: Path, digests: dict[str, Any]) -> None:
    """Replace the cache in one step; a cache that cannot be written is ignored."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix="digests-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(digests, file)
        os.replace(name, cache)
