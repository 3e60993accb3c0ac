"""Homes for Prefect whose database has its tables: making them is most of a server's first start."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import prefect
import pytest

from flows.service.server import PrefectServer
from tests.session_cache import KEPT


def prefect_home(folder: Path) -> Path:
    """A folder for PREFECT_HOME, as the first server leaves one."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_database(), folder / "prefect.db")
    return folder


def _database() -> Path:
    """A database that a server has made, kept between test runs."""
    root = KEPT
    root.mkdir(parents=True, exist_ok=True)
    kept = root / f"prefect-{prefect.__version__}.db"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as home:
                _make(Path(home)).replace(kept)
    return kept


def _make(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        server = PrefectServer().start()
        try:
            server.wait_ready()
        finally:
            server.stop()
    # Not a copy of the file: part of what was written may lie in the log beside it.
    with (
        closing(sqlite3.connect(home / "prefect.db")) as made,
        closing(sqlite3.connect(home / "whole.db")) as whole,
    ):
        made.backup(whole)
    return home / "whole.db"
