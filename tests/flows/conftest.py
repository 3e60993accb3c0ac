"""A Prefect server for tests of flows: one for a session, since it takes longer to start than most tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect  # noqa: F401  (it remembers the address that the environment had when it was imported)
import pytest
from prefect.settings import temporary_settings

from flows.service.server import PrefectServer
from tests.prefect_home import prefect_home


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PrefectServer, Path]]:
    """A real server on loopback with a database of its own, and its PREFECT_HOME."""
    home = prefect_home(tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        server = PrefectServer().start().wait_ready()
    try:
        yield server, home
    finally:
        server.stop()


@pytest.fixture(scope="session")
def long_model(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two-layer model with room for a question and its solution, a token a byte."""
    folder = make_tiny_model(tmp_path_factory.mktemp("long") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


@pytest.fixture(scope="module")
def server(running: tuple[PrefectServer, Path]) -> Iterator[PrefectServer]:
    """The session's server, which runs of the module are recorded by; others' runs are there, too."""
    server, home = running
    own: dict[Any, Any] = {"api.url": server.url, "flows.heartbeat_frequency": None}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(own), server.tracker.tracking():
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_API_URL", server.url)
        yield server
        server.flush()
