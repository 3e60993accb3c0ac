"""A service in processes of its own: `make serve` with a test's settings, its deployments, workers, runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flows.service.deploy import ROOT
from tests.deployments.api import request
from tests.flows.small import small

#: A reward of the tests: the rows' own lengths, at a pace that the file beside it says.
REWARD = """
import pathlib, time


def score(batch):
    time.sleep(float(pathlib.Path(__file__).with_name("seconds").read_text()))
    return [float(len(row.completion)) for row in batch]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Service:
    """One server and what belongs to it; whatever it started is ended with it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.auth: tuple[str, str] | None = None
        (folder / "tmp").mkdir(parents=True)
        (folder / "tested_reward.py").write_text(REWARD)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "QRPO_"))}
        self.environment = {
            **inherited,
            "QRPO_CACHE": os.environ["QRPO_CACHE"],
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_WORKER_QUERY_SECONDS": "1",  # default 10
            "PREFECT_LOGGING_COLORS": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
            "TMPDIR": str(folder / "tmp"),
            **environment,
        }
        self.client = {**self.environment, "PREFECT_API_URL": self.url}
        self.server: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run `python -m MODULE` in the background; what it prints is appended to `log(module)`."""
        with self.log(module).open("ab") as out:
            started = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**self.client, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def log(self, module: str) -> Path:
        return self.folder / f"{module}.log"

    def serve(self, seconds: float = 300) -> None:
        """`make serve`, until it answers."""
        self.server = self.start("flows.service.serve", PREFECT_API_URL="")
        deadline = time.monotonic() + seconds
        while True:
            assert self.server.poll() is None, self.log("flows.service.serve").read_text()
            assert time.monotonic() < deadline, self.log("flows.service.serve").read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)

    def run(self, module: str, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run `python -m MODULE` to its end; what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**self.client, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """A request to the API as a user's script sends it, with a CSRF token if there is authentication."""
        headers = {}
        if self.auth and method != "GET":
            token = self.ask("GET", "/csrf-token?client=test")["token"]
            headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        return request(self.url, method, path, body, auth=self.auth, headers=headers)

    def begin(self, deployment: str, experiment: dict[str, Any], **more: Any) -> str:
        """Start a run of a deployment, as the button of the UI does; its id. more : further parameters."""
        self.begun = datetime.now(UTC).isoformat()
        found = self.ask("GET", f"/deployments/name/{deployment}/{deployment}")
        path = f"/deployments/{found['id']}/create_flow_run"
        return str(self.ask("POST", path, parameters={"experiment": {"settings": experiment}, **more})["id"])

    def state(self, run: str) -> tuple[str, str]:
        """Type and message of the state of a run."""
        state = self.ask("GET", f"/flow_runs/{run}")["state"]
        return state["type"], state["message"] or ""

    def end(self, run: str, seconds: float = 600) -> tuple[str, str]:
        """Wait until a run has ended; its state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state(run)
            if state[0] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return state
            time.sleep(0.3)
        logs = "\n".join(file.read_text() for file in self.folder.glob("*.log"))
        raise AssertionError(f"still {state}\n{logs}")

    def said(self, run: str, pattern: str, seconds: float = 600) -> None:
        """Wait for a line in the log of the run that was begun last, or of a run that it has begun."""
        deadline = time.monotonic() + seconds
        while True:
            entries = self.ask("POST", "/logs/filter", logs={"timestamp": {"after_": self.begun}})
            lines = [entry["message"] for entry in entries]
            if any(re.search(pattern, line) for line in lines):
                return
            assert time.monotonic() < deadline, f"no {pattern!r} in {lines}"
            assert self.state(run)[0] not in ("FAILED", "CRASHED"), self.state(run)
            time.sleep(0.3)

    def close(self) -> None:
        for started in reversed(self._started):  # the server last
            if started.poll() is None:
                started.send_signal(signal.SIGTERM)
                try:
                    started.wait(120)
                except subprocess.TimeoutExpired:
                    started.kill()
            started.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A service test may take longer than the limit of other tests: on a busy machine, half an hour."""
    for item in items:
        if item.get_closest_marker("service") is not None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def make_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Makes a service with variables of its environment; nothing of it runs yet."""
    made: list[Service] = []

    def make(**environment: str) -> Service:
        made.append(Service(tmp_path_factory.mktemp("service"), **environment))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def write_experiment(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes a tiny experiment (20 prompts, the fake engine, a reward of the test) and returns the file."""

    def write(name: str = "small", **changed: Any) -> Path:
        experiment = {"name": name} | small(tiny_model, tmp_path / f"store-{name}") | changed
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(experiment))
        return path

    return write
