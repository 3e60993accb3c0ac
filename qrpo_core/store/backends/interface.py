"""The interface of the store's back ends: whole objects under keys, and one conditional step.

A key is a relative path with forward slashes. `write` replaces an object. `put_if_absent` is the conditional
step by which a result becomes real: it succeeds for exactly one of any number of callers.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from qrpo_core.common.errors import AccessError, MissingError, StoreError

REMEDY = "use a local directory, AWS S3, or a server that honours If-None-Match on PUT, such as SeaweedFS"


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing.

    size : bytes.
    modified : time of the write by the back end's clock, with a time zone. Only gc uses it, as the age.
    """

    key: str
    size: int
    modified: datetime


class Objects(Protocol):
    """Whole objects under keys. `url` says where, for messages."""

    url: str

    def read(self, key: str) -> bytes:
        """The object's bytes; MissingError if there is none, AccessError if access is denied."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store the object, replacing any other; readers see the old or the new one, never a part."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store the object if the key is free; False if the key has another object already."""
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """All objects below the folder `prefix`, sorted by key; none if there is no such folder."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `entries(prefix)`."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object exists; AccessError if access is denied."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""
        ...

    def upload(self, source: Path, key: str, *, unchanging: bool = False) -> None:
        """Store a local file, replacing any other object, without holding it in memory.

        unchanging : the file is synced, and nobody writes to it again: a directory may take it as it is.
        """
        ...

    def download(self, key: str, target: Path) -> None:
        """Write the object to a local file."""
        ...

    def local(self, key: str) -> Path | None:
        """The object's local path if the back end is a directory, else None."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that are free where the objects lie; None where the back end has no bound that it tells."""
        ...

    def check_conditional(self) -> None:
        """Create one small object twice below ``probe/`` and remove it.

        StoreError if the back end refuses the conditional step or accepts the second object: two writers
        would then overwrite each other.
        """
        ...


def probe(objects: Objects) -> None:
    """`Objects.check_conditional` by the other methods."""
    key = f"probe/{secrets.token_hex(16)}"
    where = f"{objects.url}/{key}"
    try:
        if not _created(objects, key):
            raise StoreError("a conditional put of a new object was refused", where=where, remedy=REMEDY)
        if objects.put_if_absent(key, b"second") or objects.read(key) != b"first":
            raise StoreError(
                "this back end ignores conditional puts (If-None-Match: *): two writers would both win",
                where=where,
                remedy=REMEDY,
            )
    finally:
        with suppress(StoreError):  # gc removes what stays below probe/
            objects.delete(key)


def _created(objects: Objects, key: str) -> bool:
    try:
        return objects.put_if_absent(key, b"first")
    except (AccessError, MissingError):
        raise
    except StoreError as error:
        objects.write(key, b"first")  # raises the same error if the condition is not the reason
        raise StoreError(
            f"this back end refuses conditional puts (If-None-Match: *): {error.message}",
            where=error.where,
            remedy=REMEDY,
        ) from None
