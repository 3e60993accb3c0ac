"""What a back end of the store can do: whole objects under keys, and one conditional step.

A key is a relative path with forward slashes. Two verbs write: `write` replaces, `create` is the one
conditional step by which something becomes real: it succeeds for exactly one of any number of callers.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from qrpo_core.errors import AccessError, MissingError, StoreError

REMEDY = "use a local directory, AWS S3, or a server that honours If-None-Match on PUT, such as SeaweedFS"


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing.

    size : bytes.
    modified : when it was written, by the back end's clock, with a time zone. It decides nothing but age.
    """

    key: str
    size: int
    modified: datetime


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

    def create_file(self, source: Path, key: str) -> bool:
        """`create` for a local file of any size, which is never held in memory whole."""
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """All objects below the folder `prefix`, sorted by key; none if there is no such folder."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of `entries(prefix)`."""
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

    def check_conditional(self) -> None:
        """Create one small object twice below ``probe/`` and remove it.

        StoreError if the back end refuses the conditional step or takes the second object: nothing here is
        safe from two writers then.
        """
        ...


def probe(objects: Objects) -> None:
    """`Objects.check_conditional` in terms of the other verbs."""
    key = f"probe/{secrets.token_hex(16)}"
    where = f"{objects.url}/{key}"
    try:
        if not _created(objects, key):
            raise StoreError("a conditional put of a new object was refused", where=where, remedy=REMEDY)
        if objects.create(key, b"second") or objects.read(key) != b"first":
            raise StoreError(
                "this back end ignores conditional puts (If-None-Match: *): two writers would both win",
                where=where,
                remedy=REMEDY,
            )
    finally:
        with suppress(StoreError):  # what stays is garbage below probe/
            objects.delete(key)


def _created(objects: Objects, key: str) -> bool:
    try:
        return objects.create(key, b"first")
    except (AccessError, MissingError):
        raise
    except StoreError as error:
        objects.write(key, b"first")  # raises the same again where it is not the condition that is refused
        raise StoreError(
            f"this back end refuses conditional puts (If-None-Match: *): {error.message}",
            where=error.where,
            remedy=REMEDY,
        ) from None
