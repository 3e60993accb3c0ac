"""Comparing content with digests: when it happens, and its outcome."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrpo_core.common.errors import MissingError
from qrpo_core.common.hashing import digest_file
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.manifest import Manifest

Verify = Literal["always", "sampled", "never"]


@dataclass(frozen=True)
class Check:
    """The outcome of verifying one object.

    key : object key of a block's manifest, or of an artifact's file.
    rows, bytes : of the block (an artifact's file has 0 rows); 0 if its manifest is unreadable.
    damage : what is wrong; empty for an intact object.
    manifest : of the block or artifact; None if it is unreadable.
    """

    key: str
    rows: int
    bytes: int
    damage: str
    manifest: BlockManifest | Manifest | None


def object_digest(objects: Objects, key: str) -> str:
    """The digest of an object as it is in the store now; MissingError if there is none."""
    local = objects.local(key)
    if local is not None:
        if not local.is_file():
            raise MissingError("no such object", where=str(local))
        return digest_file(local)
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part"
        objects.download(key, part)
        return digest_file(part)


def is_checked(verify: Verify, name: str) -> bool:
    """Whether content is compared with its digest on read. name : begins with 8 hex characters or more."""
    return verify == "always" or (verify == "sampled" and int(name[:8], 16) % 10 == 0)
