"""Where the faults of a test happen: a store on each back end, and what undisturbed runs leave."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import StoreConfig
from tests.faults.scenarios import Ground, local
from tests.faults.scene import Truth, settings


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """Settings of the experiment that everything happens to."""
    return settings(tmp_path_factory.mktemp("faults"), tiny_model)


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory, experiment: dict[str, Any]) -> Truth:
    """Undisturbed runs."""
    return Truth(tmp_path_factory.mktemp("truth"), experiment)


@pytest.fixture
def directory(tmp_path: Path, experiment: dict[str, Any], truth: Truth) -> Ground:
    """Stores in directories."""
    return Ground(tmp_path, experiment, truth, local)


@pytest.fixture
def bucket(tmp_path: Path, experiment: dict[str, Any], truth: Truth, s3_store: StoreConfig) -> Ground:
    """Stores in a bucket of a real server."""

    def store(_: Path) -> StoreConfig:
        path = f"{s3_store.path}/{secrets.token_hex(4)}"
        return s3_store.model_copy(update={"path": path, "rows_per_block": 5})

    return Ground(tmp_path, experiment, truth, store)
