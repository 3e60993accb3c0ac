"""The addresses of an artifact's page on the server of a service (`flows/service/pages.py` serves them)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrpo_core.store.manifest import Manifest

#: The environment variable that names the stores of a server, separated by blanks.
STORES = "QRPO_STORES"

#: Where the pages begin, on the address of the UI.
PREFIX = "/qrpo"

#: The HTML page of each kind of artifact that has one.
PAGES = {"report": "report.html", "compare": "comparison.html", "pool_report": "pool.html"}


def page_address(manifest: Manifest) -> str:
    """The address of the artifact's page without host and port, so that it fits wherever the UI is."""
    return f"{PREFIX}/{manifest.step}/{manifest.key}"


def stores(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The stores whose pages are shown."""
    return tuple(environment.get(STORES, "").split()) or (".qrpo",)
