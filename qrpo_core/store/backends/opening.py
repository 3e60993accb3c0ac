"""Opening the back end that an experiment's settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qrpo_core.common.errors import StoreError
from qrpo_core.common.extras import require
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.local import LocalObjects


def open_objects(config: StoreConfig) -> Objects:
    """The back end that `store.path` names. Creates nothing."""
    if "://" not in config.path:
        return LocalObjects(Path(config.path))
    if config.path.startswith("s3://"):
        require("botocore", f"store.path {config.path!r}")
        from qrpo_core.store.backends.s3 import S3Objects

        return S3Objects(config)
    scheme = config.path.partition("://")[0]
    raise StoreError(
        f"store.path {config.path!r}: unknown scheme {scheme!r}", remedy="a directory or s3://bucket/prefix"
    )


def s3_options(config: StoreConfig) -> dict[str, Any]:
    """The keyword arguments of s3fs for a store's settings, without credentials or listings cache."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if config.endpoint_url:
        options["endpoint_url"] = config.endpoint_url
    if config.region:
        options["client_kwargs"] = {"region_name": config.region}
    if config.path_style:
        options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    return options
