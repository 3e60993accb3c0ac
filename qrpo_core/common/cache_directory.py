"""The directory of local copies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The directory of copies that can be made again: $QRPO_CACHE, else the user's cache directory."""
    given = os.environ.get("QRPO_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrpo"
