"""The disk that copies in the cache directory take: those used longest ago make room for new ones.

Policies are copied for an engine's precision and from a remote store, so a comparison of many policies makes
many copies. Each can be made again, but must not go while something reads it: `use` and `hold` keep it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import ConfigError, StoreError

#: The folders of the cache directory whose entries are copies.
FOLDERS = ("rounded", "artifacts", "inputs")

_VARIABLE = "QRPO_CACHE_GB"
_DEFAULT_GB = 20.0
#: An entry that was asked for within this time may be read by someone who does not hold it.
_SECONDS = 3600.0


def use(path: Path) -> None:
    """Mark the copy that a path lies in as used now, also before it is made. It then stays for an hour."""
    if (entry := _entry_of(path)) is not None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _lock(entry).touch()


def hold(path: Path, owner: object) -> Callable[[], object]:
    """Keep the copy that a path lies in until `owner` is garbage, or what is returned is called.

    A path outside `FOLDERS` is never deleted, and holding it does nothing.
    """
    if (entry := _entry_of(path)) is None:
        return lambda: None
    use(entry)
    file = _lock(entry).open("ab")
    fcntl.flock(file, fcntl.LOCK_SH)  # released when the process ends
    return weakref.finalize(owner, file.close)


def _entry_of(path: Path) -> Path | None:
    """The entry of a folder of copies that a path is or lies in."""
    for folder in (cache_directory() / name for name in FOLDERS):
        if folder in path.parents:
            return folder / path.relative_to(folder).parts[0]
    return None


@contextmanager
def written(entry: Path) -> Iterator[None]:
    """Raise StoreError where a copy cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write a copy to the cache: {error}",
            where=str(entry),
            remedy="make room there, or set QRPO_CACHE to another folder, and run again",
        ) from error


def limit() -> float:
    """Bytes that copies may take, $QRPO_CACHE_GB or 20 GB. Raises ConfigError for no number of gigabytes."""
    given = os.environ.get(_VARIABLE, "").strip()
    try:
        gigabytes = float(given) if given else _DEFAULT_GB
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ConfigError(f"{given!r} is not a number of gigabytes", where=_VARIABLE, remedy="0 or more")
    return gigabytes * 1e9


def make_room(needed: int = 0) -> None:
    """Delete the copies used longest ago until `needed` bytes fit, within the limit and on the disk.

    Those that are held, by any process, and those asked for within the last hour stay, even beyond the limit.
    """
    cache = cache_directory()
    entries = {path: _size_and_use(path) for folder in FOLDERS for path in _entries(cache / folder)}
    excess = needed + sum(size for size, _ in entries.values()) - limit()
    with contextlib.suppress(FileNotFoundError):  # no copy was ever made
        excess = max(excess, needed - shutil.disk_usage(cache).free)
    for path, (size, used) in sorted(entries.items(), key=lambda entry: entry[1][1]):
        if excess <= 0 or time.time() - used < _SECONDS:
            return
        if _delete(path):
            excess -= size


def _delete(entry: Path) -> bool:
    """Whether nobody held the entry; it is gone then."""
    with _lock(entry).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            return False
        gone = entry.with_name(f"{entry.name}.gone")
        with contextlib.suppress(OSError):  # another process is at it
            shutil.rmtree(gone, ignore_errors=True)  # of a process that was killed here
            entry.rename(gone)  # never a copy that lacks files
            shutil.rmtree(gone, ignore_errors=True)
    return True


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def taken(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is none."""
    return _size_and_use(folder)[0]


def _size_and_use(entry: Path) -> tuple[int, float]:
    """Bytes of a copy, and when it was last asked for, or written to by who makes it."""
    size, used = 0, 0.0
    for path in (_lock(entry), *entry.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found = path.lstat()
            size, used = size + found.st_size, max(used, found.st_mtime)
    return size, used


def _lock(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.used")
