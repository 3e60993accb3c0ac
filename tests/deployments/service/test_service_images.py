"""The container files built, and a service of their containers: its pages, its deployments, a worker, a run.

Needs root on Linux, Debian's packages mmdebstrap and buildah, and 8 GB of disk. No registry of images is
asked: the base is Debian with Python 3.11 in place of python:3.11-slim. pip installs wheels that pip has
fetched here, from the index that it is configured with.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flows.service.deploy import ROOT
from qrpo_core.config import Experiment
from tests.deployments.api import references
from tests.deployments.service.conftest import Service
from tests.flows.small import small

SUITE = "bookworm"  # the Debian that has Python 3.11, as the public base has
USER = 10001
GIGABYTES = 8
#: The base of both images. Its pip installs into Debian's Python, from the wheels alone.
BASE = """
FROM scratch
ADD base.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
RUN ln -s python3 /usr/bin/python
"""


class Containers:
    """Images and containers in a folder of the test, by buildah without a container runtime."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def buildah(self, *arguments: str | Path) -> str:
        """Run buildah to its end; what it printed."""
        done = subprocess.run(self._command(*arguments), capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + (done.stderr if arguments[0] == "run" else "")

    def build(self, name: str, file: Path, context: Path, *options: str) -> None:
        self.buildah("build", "--pull=never", "--isolation=chroot", *options, "-f", file, "-t", name, context)

    def run(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """Run a command in a container, as the image's user; what it printed."""
        return self.buildah("run", "--isolation=chroot", *options, name, "--", *command)

    def start(self, name: str, log: Path, options: tuple[str, ...]) -> None:
        """Start the image's own command in a container, in the background."""
        config = json.loads(self.buildah("inspect", name))["OCIv1"]["config"]
        command = self._command("run", "--isolation=chroot", *options, name, "--", *config["Cmd"])
        with log.open("wb") as out:
            started = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        self._started.append(started)

    def close(self) -> None:
        for started in reversed(self._started):
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(started.pid, number)
                    started.wait(60)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass
        self.buildah("rm", "--all")
        shutil.rmtree(self.folder)

    def _command(self, *arguments: str | Path) -> list[str]:
        where = ["--root", self.folder / "images", "--runroot", self.folder / "run", "--storage-driver=vfs"]
        return [str(word) for word in ("buildah", *where, *arguments)]


def wanted() -> list[str]:
    """What the container files install, without the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        line for name in ("pipeline", "rewards", "lora") for line in project["optional-dependencies"][name]
    ]
    # For the build of the project, for PostgreSQL, and for redis where Python is older than 3.11.3.
    return [*project["dependencies"], *extras, "setuptools>=77", "asyncpg", "async-timeout"]


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """The images `server` and `worker-cpu`."""
    if missing := [name for name in ("mmdebstrap", "buildah") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: apt-get install mmdebstrap buildah)")
    if os.geteuid() != 0:
        pytest.skip("buildah's chroot isolation is tested as root")
    folder = tmp_path_factory.mktemp("containers")
    if shutil.disk_usage(folder).free < GIGABYTES * 10**9:
        pytest.skip(f"{folder} has less than {GIGABYTES} GB free")
    made = Containers(folder)
    try:
        context, wheels = folder / "base", folder / "wheels"
        context.mkdir()
        packages = "--include=python3,python3-pip,passwd,ca-certificates"
        tar = context / "base.tar"
        command = ["mmdebstrap", "--variant=minbase", packages, SUITE, tar]
        subprocess.run(command, check=True, capture_output=True, timeout=1800)
        (context / "Dockerfile").write_text(BASE)
        try:
            made.buildah("build", "--isolation=chroot", "-t", "localhost/base", context)
        except AssertionError as error:
            pytest.skip(f"buildah builds and runs nothing with this kernel: {error}")
        tar.unlink()
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "-w",
            wheels,
            "-c",
            ROOT / "requirements.lock",
        ]
        subprocess.run([*pip, *wanted()], check=True, capture_output=True, timeout=1800)
        for name in ("server", "worker-cpu"):
            file = ROOT / f"deployments/containers/{name}.Dockerfile"
            options = ("--build-arg=BASE=localhost/base", f"--volume={wheels}:/wheels:ro")
            made.build(f"localhost/{name}", file, ROOT, *options)
            made.buildah("from", "--pull-never", "--name", name, f"localhost/{name}")
        yield made
    finally:
        made.close()


@pytest.mark.service
@pytest.mark.timeout(5400)
def test_a_worker_in_a_container_computes_a_run_of_a_server_in_a_container(
    containers: Containers, make_service: Callable[..., Service], tmp_path: Path, tiny_model: Path
) -> None:
    service = make_service()
    password = secrets.token_hex(12)
    service.auth = ("operator", password)
    auth = f"--env=PREFECT_API_AUTH_STRING=operator:{password}"
    # The network is this machine's: without a network of its own, a container must listen on loopback.
    address = ("--env=PREFECT_SERVER_API_HOST=127.0.0.1", f"--env=PREFECT_SERVER_API_PORT={service.port}")
    log = service.folder / "server.log"
    containers.start("server", log, (auth, *address))
    root = service.url.removesuffix("/api")
    deadline = time.monotonic() + 600
    while True:
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{service.url}/health", auth=service.auth, timeout=5).is_success:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    assert "Authentication: requires PREFECT_API_AUTH_STRING" in log.read_text()
    assert httpx.get(f"{service.url}/deployments/name/a/a", timeout=60).status_code == 401
    assert httpx.get(f"{root}/qrpo/runs", auth=service.auth, timeout=60).is_success
    page = httpx.get(root, auth=service.auth, follow_redirects=True, timeout=60)
    assert "<html" in page.text
    assert page.is_success  # the UI was copied to where the server's user may write

    model, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(tiny_model, model)
    store.mkdir()
    os.chown(store, USER, USER)
    for path in (model, *model.iterdir()):
        path.chmod(0o755)  # the container's user reads them
    mounts = (f"--volume={model}:/model:ro", f"--volume={store}:/store:rw")
    client = (auth, f"--env=PREFECT_API_URL={service.url}", *mounts)
    assert "Work pool cpu created." in containers.run(
        "worker-cpu", "python", "-m", "flows.service.deploy", options=client
    )
    containers.start("worker-cpu", service.folder / "worker.log", client)
    settings: dict[str, Any] = small(Path("/model"), Path("/store")) | {"name": "contained"}
    run = service.begin("precompute", Experiment.model_validate(settings).model_dump(mode="json"), pool=None)
    assert service.end(run)[0] == "COMPLETED", (service.folder / "worker.log").read_text()
    assert {path.stat().st_uid for path in store.rglob("*")} == {USER}
    # The recipes are those of this machine, and every row is there.
    assert references(Experiment.model_validate(small(model, store))) == Counter({4: 15})

    (store / "small.yaml").write_text(yaml.safe_dump(settings))
    printed = containers.run("worker-cpu", "qrpo", "run", "/store/small.yaml", options=client)
    assert re.search(r"sample references +cached, 60 rows reused", printed), printed
    assert list(store.rglob("report.html"))  # it has trained and compared
