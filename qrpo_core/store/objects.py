"""The two back ends: a local directory and S3, behind one small interface.

A key is a relative path with forward slashes. Two verbs write: `write` replaces, `create` is the one
conditional step by which something becomes real: it succeeds for exactly one of any number of callers.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from qrpo_core.config import StoreConfig
from qrpo_core.errors import AccessError, MissingError, StoreError


class Objects(Protocol):
    """Whole objects under keys. `url` says where, for messages."""

    url: str

    def read(self, key: str) -> bytes:
        """The object's bytes; MissingError if there is none, AccessError if not allowed."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put the object there, replacing what was; readers see the old or the new one, never a part."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put the object there if nothing is; False means somebody else's object is there already."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below the folder `prefix`, sorted; none if there is no such folder."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object; AccessError if not allowed to know."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""
        ...

    def upload(self, source: Path, key: str) -> None:
        """Put a local file there, replacing what was, without holding it in memory."""
        ...

    def download(self, key: str, target: Path) -> None:
        """Write the object to a local file."""
        ...

    def local(self, key: str) -> Path | None:
        """The object's own local path where the back end has one, else None."""
        ...


def open_objects(config: StoreConfig) -> Objects:
    """The back end that `store.path` names. Creates nothing."""
    if "://" not in config.path:
        return LocalObjects(Path(config.path))
    if config.path.startswith("s3://"):
        return S3Objects(config)
    scheme = config.path.partition("://")[0]
    raise StoreError(
        f"store.path {config.path!r}: unknown scheme {scheme!r}", remedy="a directory or s3://bucket/prefix"
    )


class LocalObjects:
    """Objects as files below a directory, which is made at the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(data) as temporary:
            os.replace(temporary, self._parent(key))

    def create(self, key: str, data: bytes) -> bool:
        # A hard link is atomic and refuses an existing name, and the content is complete before it.
        with self._translated(key), self._temporary(data) as temporary:
            try:
                os.link(temporary, self._parent(key))
            except FileExistsError:
                return False
            return True

    def keys(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix)
        with self._translated(prefix):
            files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        for path in files:
            yield path.relative_to(self.root).as_posix()

    def exists(self, key: str) -> bool:
        with self._translated(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def upload(self, source: Path, key: str) -> None:
        with self._translated(key), self._temporary(b"") as temporary:
            shutil.copyfile(source, temporary)
            os.replace(temporary, self._parent(key))

    def download(self, key: str, target: Path) -> None:
        with self._translated(key):
            shutil.copyfile(self._path(key), target)

    def local(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.root / key

    def _parent(self, key: str) -> Path:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A complete, synced file on the same file system, gone afterwards unless it was moved."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / secrets.token_hex(16)  # not mkstemp: its files are closed to other users
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

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
            raise StoreError(f"{error.strerror or error}", where=where) from error


class S3Objects:
    """Objects in an S3 bucket through s3fs. Credentials come from the environment or the AWS files."""

    def __init__(self, config: StoreConfig) -> None:
        self.url = config.path.rstrip("/")
        self.bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise StoreError(f"store.path {config.path!r} names no bucket", remedy="write s3://bucket/prefix")
        self.fs = open_s3(config)

    def read(self, key: str) -> bytes:
        with self._translated(key):
            data: bytes = self.fs.cat_file(self._path(key))
            return data

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key):
            self.fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        # The call itself instead of s3fs's exclusive mode, whose exception differs between servers.
        try:
            with self._translated(key):
                self.fs.call_s3(
                    "put_object", Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*"
                )
        except _ExistsError:
            return False
        return True

    def keys(self, prefix: str) -> Iterator[str]:
        top = f"{self.bucket}/{self.prefix}"
        with self._translated(prefix):
            try:
                found = sorted(self.fs.find(self._path(prefix.rstrip("/") + "/")))
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                found = []
        for path in found:
            yield path.removeprefix(top)

    def exists(self, key: str) -> bool:
        try:
            with self._translated(key):
                self.fs.call_s3("head_object", Bucket=self.bucket, Key=self.prefix + key)
        except MissingError:
            return False
        return True

    def delete(self, key: str) -> None:
        with self._translated(key):
            self.fs.call_s3("delete_object", Bucket=self.bucket, Key=self.prefix + key)

    def upload(self, source: Path, key: str) -> None:
        with self._translated(key):
            self.fs.put_file(str(source), self._path(key))

    def download(self, key: str, target: Path) -> None:
        with self._translated(key):
            self.fs.get_file(self._path(key), str(target))

    def local(self, key: str) -> Path | None:
        return None

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self.prefix}{key}"

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}"
        try:
            yield
        except OSError as error:
            code, status = _code(error), _status(error)
            if status == 412:
                raise _ExistsError("something is there already", where=where) from None
            if code == "NoSuchBucket":
                raise StoreError(
                    f"no bucket {self.bucket!r}", where=where, remedy="create it or mend store.path"
                ) from None
            if isinstance(error, PermissionError) or status == 403:
                raise AccessError(
                    f"not allowed ({code or 'AccessDenied'})",
                    where=where,
                    remedy="check the AWS credentials and policy",
                ) from None
            if isinstance(error, FileNotFoundError) or status == 404:
                raise MissingError("no such object", where=where) from None
            raise StoreError(f"{error}", where=where) from error
        except Exception as error:
            if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
                raise StoreError(
                    f"{error}", where=where, remedy="check store.endpoint_url and credentials"
                ) from error
            raise


class _ExistsError(StoreError):
    """The conditional put found something there."""


def open_s3(config: StoreConfig) -> Any:
    """An s3fs file system for a store's settings, without a listings cache (others write too)."""
    import fsspec

    return fsspec.filesystem("s3", **s3_options(config))


def s3_options(config: StoreConfig) -> dict[str, Any]:
    """Keyword arguments of s3fs for a store's settings; no credentials among them."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if config.endpoint_url:
        options["endpoint_url"] = config.endpoint_url
    if config.region:
        options["client_kwargs"] = {"region_name": config.region}
    if config.path_style:
        options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    return options


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error.__cause__ or error, "response", None)
    return response if isinstance(response, dict) else {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
