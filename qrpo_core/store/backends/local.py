"""The store in a directory. Whatever a call has written survives a power cut after its return."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from qrpo_core.common.errors import AccessError, MissingError, StoreError
from qrpo_core.store.backends.interface import Entry, probe

#: Errors of a full disk: no space, quota exceeded, file larger than allowed.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class LocalObjects:
    """Objects as files below a directory, which the first write creates.

    Every object is written to a file in ``tmp/``, synced, and then named in one step: by a rename (`write`)
    or an exclusive hard link (`put_if_absent`). Then its folder is synced, too.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)
        self._prefix = os.path.join(self.root, "")

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key):
            self._replace(key, lambda file: _write(file, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._translated(key):
            return self._link(key, data)

    def entries(self, prefix: str) -> Iterator[Entry]:
        found = []
        with self._translated(prefix):
            for key, file in self._walk(self._path(prefix)):
                with suppress(FileNotFoundError):  # it went away meanwhile
                    status = file.stat()
                    found.append(Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)))
        yield from sorted(found, key=lambda entry: entry.key)

    def keys(self, prefix: str) -> Iterator[str]:
        with self._translated(prefix):
            found = sorted(key for key, _ in self._walk(self._path(prefix)))
        yield from found

    def exists(self, key: str) -> bool:
        with self._translated(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def upload(self, source: Path, key: str, *, unchanging: bool = False) -> None:
        if unchanging and self._named(source, key):
            return
        with _opened(source) as content, self._translated(key):
            self._replace(key, lambda file: shutil.copyfileobj(content, file, 1 << 20))

    def download(self, key: str, target: Path) -> None:
        with self._translated(key):
            shutil.copyfile(self._path(key), target)

    def local(self, key: str) -> Path | None:
        return self._path(key)

    def free_bytes(self) -> int | None:
        there = next(each for each in (self.root, *self.root.parents) if each.exists())
        return shutil.disk_usage(there).free

    def check_conditional(self) -> None:
        probe(self)

    def _path(self, key: str) -> Path:
        return self.root / key

    def _replace(self, key: str, fill: Callable[[BinaryIO], None]) -> None:
        with self._temporary(fill) as temporary:
            path = self._path(key)
            _make_folder(path.parent)
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def _link(self, key: str, data: bytes) -> bool:
        # A hard link is atomic and refuses an existing name, and the content is complete before it.
        with self._temporary(lambda file: _write(file, data)) as temporary:
            path = self._path(key)
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A network file system may lose the answer to a successful link, and try again.
                if temporary.stat().st_nlink < 2:
                    return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StoreError(
                    f"this file system makes no hard links ({error.strerror}), and creating needs them",
                    where=str(path),
                    remedy="put the store on another file system",
                ) from None
            _sync_folder(path.parent)
            return True

    def _named(self, source: Path, key: str) -> bool:
        """Give the file a second name in the store, which costs no space; False if that cannot be done."""
        path = self._path(key)
        try:
            _make_folder(path.parent)
            os.link(source, path)
            _sync_folder(path.parent)
        except OSError:  # another file system, or an object that has to be replaced
            return False
        return True

    @contextmanager
    def _temporary(self, fill: Callable[[BinaryIO], None]) -> Iterator[Path]:
        """A complete, synced file on the same file system; it is deleted afterwards unless it was moved."""
        folder = self.root / "tmp"
        _make_folder(folder)
        path = folder / secrets.token_hex(16)  # not mkstemp: its files are closed to other users
        try:
            with path.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _walk(self, folder: str | Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """The files below a folder, with their keys. Without sizes, since it runs before every block."""
        try:
            children = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for child in children:
            if child.is_dir():
                yield from self._walk(child.path)
            else:
                yield child.path.removeprefix(self._prefix).replace(os.sep, "/"), child

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}"
        try:
            yield
        except FileNotFoundError:
            raise MissingError("no such object", where=where) from None
        except PermissionError as error:
            raise AccessError(
                f"not allowed: {error.strerror}", where=where, remedy="check the directory's owner"
            ) from None
        except OSError as error:
            if error.errno in _FULL:
                raise StoreError(
                    f"the disk is full ({error.strerror})",
                    where=where,
                    remedy="make room and run again: what was committed is whole, and no part was left",
                ) from error
            if error.errno == errno.EROFS:
                raise StoreError(
                    "the file system is read-only", where=where, remedy="remount it or move the store"
                ) from error
            raise StoreError(f"{error.strerror or error}", where=where) from error


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _opened(source: Path) -> BinaryIO:
    """The caller's file; its absence is not a MissingError."""
    try:
        return source.open("rb")
    except OSError as error:
        raise StoreError(f"cannot read the file: {error.strerror}", where=str(source)) from error


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, synced."""
    if folder.is_dir():
        return
    made = [folder, *(each for each in folder.parents if not each.is_dir())]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        _sync_folder(each.parent)


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder, so that they survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync folders
            raise
    finally:
        os.close(handle)
