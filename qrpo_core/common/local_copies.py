"""The disk that copies in the cache directory take: those used longest ago make room for new ones.

Policies are copied for an engine's precision and from a remote store, so a comparison of many policies makes
many copies. Each can be made again, but must not go while something reads it: `use` and `Hold` keep it.

Beside each entry of a folder of copies lies its mark, the file ``NAME.used``: when it was last asked for, and
the lock of those that hold it. Who makes a copy makes its mark first (`mark`). Only what has one is deleted:
a store that lies where the cache does, with folders of the same names, loses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import ConfigError, StoreError

#: The folders of the cache directory whose entries are copies.
FOLDERS = ("rounded", "artifacts", "inputs")
#: How the name of a copy in the making ends, after that of its entry.
PART = ".part"

_GONE = ".gone"
_VARIABLE = "QRPO_CACHE_GB"
_DEFAULT_GB = 20.0
#: An entry that was asked for within this time may be read by someone who does not hold it.
_SECONDS = 3600.0
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Hold:
    """Keeps the marked copy that a path lies in until `close`, or until this is garbage.

    It does nothing for any other path.
    """

    def __init__(self, path: Path) -> None:
        file = None if (entry := _entry_of(path)) is None else _held(entry)
        #: Let the copy go.
        self.close = weakref.finalize(self, _release, file)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mark(entry: Path) -> None:
    """Say that a copy will be made in a folder of `FOLDERS`, or was: it is used now, and stays for an hour.

    In a cache that this user cannot write to it does nothing.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _mark(entry).open("ab").close()
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
    use(entry)


def use(path: Path) -> None:
    """Note that the marked copy that a path lies in is used now: it stays for an hour.

    That of another user stays only while it is held.
    """
    Hold(path).close()


@contextmanager
def written(what: str, place: Path) -> Iterator[None]:
    """Raise StoreError where something cannot be written to the cache directory, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {what}: {error}",
            where=str(place),
            remedy="make room there, or set QRPO_CACHE to another folder, and run again",
        ) from error


def limit() -> float:
    """Bytes that copies may take, $QRPO_CACHE_GB or 20 GB. Raises ConfigError for no number of gigabytes."""
    given = os.environ.get(_VARIABLE, "").strip()
    try:
        gigabytes = float(given) if given else _DEFAULT_GB
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ConfigError(f"{given!r} is not a number of gigabytes", where=_VARIABLE, remedy="0 or more")
    return gigabytes * 1e9


def make_room(needed: int) -> None:
    """Delete the copies used longest ago until `needed` bytes fit, within the limit and on the disk.

    Those that are held, by any process, and those asked for within the last hour stay, even beyond the limit.
    """
    copies = {}
    for entry in (entry for folder in FOLDERS for entry in _entries(folder)):
        if entry.name.endswith(_GONE):  # of a process that was killed while deleting
            shutil.rmtree(entry, ignore_errors=True)
        else:
            copies[entry] = _size_and_use(entry)
    old = [entry for entry, (_, used) in copies.items() if time.time() - used >= _SECONDS]
    excess = needed + sum(size for size, _ in copies.values()) - limit()
    with contextlib.suppress(FileNotFoundError):  # no copy was ever made
        lacking = needed - shutil.disk_usage(cache_directory()).free
        if lacking <= sum(copies[entry][0] for entry in old):  # else it helps nobody
            excess = max(excess, lacking)
    for entry in sorted(old, key=lambda entry: copies[entry][1]):
        if excess <= 0:
            return
        if _delete(entry):
            excess -= copies[entry][0]


def taken(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is none."""
    return _size_and_use(folder)[0]


def _entry_of(path: Path) -> Path | None:
    """The entry of a folder of copies that a path is or lies in, links followed."""
    real = path.resolve()
    for folder in (cache_directory() / name for name in FOLDERS):
        if (place := folder.resolve()) in real.parents:
            return folder / real.relative_to(place).parts[0]
    return None


def _held(entry: Path) -> BinaryIO | None:
    """The entry's mark, of now, locked against deletion; None where there is none."""
    file: BinaryIO
    try:
        try:
            file = _mark(entry).open("r+b")
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            file = _mark(entry).open("rb")  # of another user
    except (FileNotFoundError, PermissionError):
        return None
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is deleted
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for a deletion; released when the process ends
    with contextlib.suppress(OSError):
        os.utime(file.fileno())
    return file


def _release(file: BinaryIO | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a child process may have the file, too
        file.close()


def _delete(entry: Path) -> bool:
    """Whether the entry is gone: nobody held it, or asked for it meanwhile."""
    gone = entry.with_name(f"{entry.name}{_GONE}")
    try:
        with _mark(entry).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - _size_and_use(entry)[1] < _SECONDS:
                return False
            shutil.rmtree(gone, ignore_errors=True)
            entry.rename(gone)  # never a copy that lacks files
    except OSError:  # held, of another user, or on a file system without locks
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return not gone.exists()


def _entries(folder: str) -> list[Path]:
    """What may be deleted of a folder: what has a mark."""
    try:
        found = list((cache_directory() / folder).iterdir())
    except OSError:
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink() and _mark(path).exists()]


def _size_and_use(entry: Path) -> tuple[int, float]:
    """Bytes of a copy, and when it was last asked for, or written to by who makes it."""
    # os.walk goes on where a folder vanishes.
    inside = [Path(folder, name) for folder, _, names in os.walk(entry) for name in names]
    size, used = 0, 0.0
    for path in (entry, _mark(entry), *inside):
        with contextlib.suppress(OSError):
            found = path.lstat()
            size += 0 if path == entry else found.st_size
            used = max(used, found.st_mtime)
    return size, used


def _mark(entry: Path) -> Path:
    """The mark of a copy, in the making or made: names of entries have no dot."""
    return entry.with_name(f"{entry.name.split('.')[0]}.used")
