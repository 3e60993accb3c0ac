"""Digests of large files, remembered by path, size and time of change."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qrpo_core.ids import digest_file
from qrpo_core.store.artifacts import cache_directory

#: A file changed this recently is hashed again next time: its times may not show another change at once.
_SETTLED_SECONDS = 2.0


def file_digests(paths: Iterable[Path]) -> list[str]:
    """sha256 of each file, remembered by resolved path, size and modification time."""
    memory = cache_directory() / "digests.json"
    known = _remembered(memory)
    fresh: dict[str, list[Any]] = {}
    digests = []
    for path in paths:
        real = path.resolve()
        status = real.stat()
        entry = known.get(str(real))
        if isinstance(entry, list) and entry[:2] == [status.st_size, status.st_mtime_ns] and len(entry) == 3:
            digests.append(str(entry[2]))
            continue
        digests.append(digest_file(real))
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            fresh[str(real)] = [status.st_size, status.st_mtime_ns, digests[-1]]
    if fresh:
        _remember(memory, _remembered(memory) | fresh)
    return digests


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent or damaged: it holds nothing that cannot be computed again
    return value if isinstance(value, dict) else {}


def _remember(memory: Path, digests: dict[str, Any]) -> None:
    """Replace the memory in one step; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix="digests-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(digests, file)
        os.replace(name, memory)
