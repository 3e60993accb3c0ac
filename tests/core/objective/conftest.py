"""Files that lie beside the repository, and the golden values among them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3].parent / "shared"


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """The path of a file under <repository>/../shared; the test is skipped, naming it, where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"{path} is absent")
        return path

    return find


@pytest.fixture(scope="session")
def golden(shared_file: Callable[[str], Path]) -> dict[str, list[dict[str, Any]]]:
    """Reference values from 50-digit arithmetic."""
    values: dict[str, list[dict[str, Any]]] = json.loads(shared_file("golden/partition.json").read_text())
    return values
