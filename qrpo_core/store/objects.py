"""The two back ends of the store behind one interface, and how one is opened."""

from __future__ import annotations

from pathlib import Path

from qrpo_core.config import StoreConfig
from qrpo_core.errors import StoreError
from qrpo_core.store.interface import Entry, Objects
from qrpo_core.store.local import LocalObjects
from qrpo_core.store.s3 import S3Objects, s3_options

__all__ = ["Entry", "LocalObjects", "Objects", "S3Objects", "open_objects", "s3_options"]


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
