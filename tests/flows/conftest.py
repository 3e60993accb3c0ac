"""A Prefect server for the flows of a test module."""

from __future__ import annotations

from collections.abc import Iterator

import prefect  # noqa: F401  (it remembers the address that the environment had when it was imported)
import pytest

from flows.server import PrefectServer, prefect_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real server on loopback with a database of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_server(PrefectServer().start()) as server:
            yield server
