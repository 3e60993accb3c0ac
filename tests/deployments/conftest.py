"""A service as an operator has it: a server, deployments put there by `make deploy`, and its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect  # noqa: F401  (it remembers the address that the environment had when it was imported)
import pytest
import yaml

from flows.service.deploy import ROOT
from flows.service.server import PrefectServer, prefect_server
from qrpo_core.config.reading import load_experiment
from tests.flows.small import small
from tests.prefect_home import prefect_home


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real server on loopback with a database of its own; children find it by the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_home(tmp_path_factory.mktemp("prefect"))))
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")  # default 10
        with prefect_server(PrefectServer().start()) as server:
            yield server


@pytest.fixture(scope="module")
def deploy(server: PrefectServer) -> Callable[[], str]:
    """What the target `deploy` of the Makefile runs; returns what it printed."""

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.service.deploy"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def deployed(deploy: Callable[[], str]) -> str:
    """The deployments are on the server; what the command printed the first time."""
    return deploy()


@pytest.fixture(scope="module")
def working(deployed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """`make workers` in the background: the process, the leader of its group, and its log.

    Runs can import the module `endless`, whose reward `score` does not come to an end.
    """
    folder = tmp_path_factory.mktemp("workers")
    (folder / "endless.py").write_text("import time\n\n\ndef score(batch):\n    time.sleep(600)\n")
    log = folder / "log"
    with log.open("wb") as out:
        started = subprocess.Popen(
            [sys.executable, "-m", "flows.service.workers"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder), "PREFECT_LOGGING_COLORS": "false"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started, log
    finally:
        if started.poll() is None:
            started.terminate()
        started.wait(300)


@pytest.fixture
def workers(working: tuple[Any, Path]) -> Path:
    """The log of workers that run."""
    started, log = working
    assert started.poll() is None, log.read_text()
    return log


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """Parameters of a run, as the UI's form sends them: every field, 20 prompts, the fake engine."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    return load_experiment(path).model_dump(mode="json")
