"""The directory of local copies."""

from __future__ import annotations

import os
from pathlib import Path

#: The folder of the cache directory with the checkpoints of trainings that have not ended.
TRAININGS = "training"


def cache_directory() -> Path:
    """The directory of copies and checkpoints: $QRPO_CACHE, else the user's cache directory."""
    given = os.environ.get("QRPO_CACHE")
    if given:
        return Path(os.path.expanduser(given)).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "qrpo"
