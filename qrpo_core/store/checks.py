"""Content against digest: when it is compared, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qrpo_core.store.artifacts import Manifest
    from qrpo_core.store.block_manifest import BlockManifest

Verify = Literal["always", "sampled", "never"]


@dataclass(frozen=True)
class Check:
    """One thing that `verify` has looked at.

    key : object key of a block's index entry, or of an artifact's file.
    rows, bytes : of the block (an artifact's file has 0 rows); 0 where its manifest is unreadable.
    damage : what is wrong, empty where it is whole.
    manifest : of the block or artifact; None where it is unreadable.
    """

    key: str
    rows: int
    bytes: int
    damage: str
    manifest: BlockManifest | Manifest | None


def is_checked(verify: Verify, name: str) -> bool:
    """Whether content is compared with its digest on read. name : begins with 8 hex characters or more."""
    return verify == "always" or (verify == "sampled" and int(name[:8], 16) % 10 == 0)
