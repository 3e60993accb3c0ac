"""A cache directory with copies of any age, and the limit of 3 MB."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qrpo_core.common.local_copies import mark

MEGABYTE = 10**6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QRPO_CACHE_GB", "0.003")
    return tmp_path / "cache"


def copy(cache: Path, name: str, *, hours_ago: float, size: int = MEGABYTE) -> Path:
    """A copy that was last asked for so long ago."""
    entry = cache / name
    entry.mkdir(parents=True)
    (entry / "weights").write_bytes(b"\0" * size)
    mark(entry)
    age(entry, hours_ago)
    return entry


def age(entry: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for path in (*entry.rglob("*"), entry, entry.with_name(f"{entry.name.split('.')[0]}.used")):
        os.utime(path, (then, then))
