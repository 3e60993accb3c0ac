"""A service as `make serve`, `make deploy` and `make workers` start it, and a browser that looks at its UI.

The browser is Debian's Chromium (apt install chromium); without it these tests are skipped. With
QRPO_SCREENSHOTS=DIRECTORY in the environment they leave pictures there: those of docs/images.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from flows.service.deploy import ROOT
from qrpo_core.config.reading import load_experiment
from tests.conftest import write_tiny_model
from tests.deployments.api import request

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
#: As root, in a container, and without asking its maker for anything.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: The only foreign host that a page of Prefect's UI asks: for the settings of a script that then sends
#: nothing, since the server's analytics are off.
TOLERATED = {"sr-client-cfg.amplitude.com"}

#: What `align` begins with here: 24 prompts and a model of two layers.
CHANGED: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "prompts": {
        "kind": "template",
        "templates": ["Say {w}"],
        "words": {"w": [f"item {number}" for number in range(24)]},
        "size": 24,
        "held_out": 0.4,
    },
    "sampling": {"engine": "transformers", "references_per_prompt": 4, "max_new_tokens": 12},
    "reward": {"kind": "length", "max_words": 1},
    "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-2},
    "evaluation": {
        "samples_per_prompt": 2,
        "resamples": 200,
        "judges": {"brevity": {"kind": "length", "max_words": 3}},
    },
    "store": {"rows_per_block": 16},
    "service": {"gpu_hour_price": 2.5, "currency": "EUR"},
}


@dataclass(frozen=True)
class Service:
    """A running service. url : of its UI; folder : of its logs; experiment : what `align` begins with."""

    url: str
    folder: Path
    experiment: dict[str, Any]

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """A request to the API."""
        return request(f"{self.url}/api", method, path, body)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder with a short name, since pages show paths in it."""
    with tempfile.TemporaryDirectory(prefix="qrpo-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def service(folder: Path) -> Iterator[Service]:
    """The service, with the deployments of this checkout; `align` begins with a tiny experiment."""
    if not Path(CHROMIUM).exists():
        pytest.skip("no Chromium for the browser tests: apt install chromium")
    pytest.importorskip("playwright")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    environment["QRPO_STORES"] = str(folder / "store")
    clients = environment | {"PREFECT_API_URL": f"{url}/api", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    with contextlib.ExitStack() as running:
        server = running.enter_context(_started("serve", environment, folder))
        _wait_for(f"{url}/api/health", server, folder / "serve.log")
        subprocess.run(
            _command("deploy"), cwd=ROOT, env=clients, check=True, capture_output=True, timeout=600
        )
        found = Service(url, folder, _experiment(folder))
        align = found.ask("GET", "/deployments/name/align/align")
        parameters = align["parameters"] | {"experiment": {"based_on": str(folder / "tiny.yaml")}}
        found.ask("PATCH", f"/deployments/{align['id']}", parameters=parameters)
        running.enter_context(_started("workers", clients, folder))
        deadline = time.monotonic() + 600
        while not found.ask("POST", "/work_pools/gpu/workers/filter"):
            assert time.monotonic() < deadline, (folder / "workers.log").read_text()
            time.sleep(0.5)
        yield found


@pytest.fixture
def page(service: Service) -> Iterator[Any]:
    """An empty browser's page; no request leaves the machine, and who else is asked fails the test."""
    from playwright.sync_api import sync_playwright

    strangers: set[str] = set()

    def handle(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.hostname == "127.0.0.1":
            route.continue_()
        else:
            strangers.add(str(address.hostname))
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB", timezone_id="UTC")
        page.route(re.compile("^https?:"), handle)
        page.set_default_timeout(30_000)
        yield page
        browser.close()
    assert strangers <= TOLERATED


@pytest.fixture
def picture(page: Any) -> Callable[[str], None]:
    """Keeps what the page shows now as NAME.png, where QRPO_SCREENSHOTS says so."""

    def take(name: str) -> None:
        if target := os.environ.get("QRPO_SCREENSHOTS"):
            page.screenshot(path=Path(target) / f"{name}.png", animations="disabled")

    return take


def _experiment(folder: Path) -> dict[str, Any]:
    """Every setting of the tiny experiment, whose file the form begins with."""
    changed = {name: dict(section) for name, section in CHANGED.items()}
    changed["model"]["path"] = str(write_tiny_model(folder / "tiny-llama"))
    changed["store"]["path"] = str(folder / "store")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(changed))
    return load_experiment(folder / "tiny.yaml").model_dump(mode="json")


def _command(target: str) -> list[str]:
    """What the Makefile runs for a target."""
    told = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in told.splitlines() if " -m flows." in line]
    return line.split()


@contextlib.contextmanager
def _started(target: str, environment: dict[str, str], folder: Path) -> Iterator[Any]:
    with (folder / f"{target}.log").open("wb") as log:
        process = subprocess.Popen(
            _command(target),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, server: Any, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).is_success:
                return
        time.sleep(0.3)
    raise AssertionError(f"no server at {url}\n{log.read_text()}")
