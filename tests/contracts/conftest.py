"""A real S3 server, started once a session on loopback and ended by its own process id."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrpo_core.config import StoreConfig

BUCKET = "qrpo-tests"
ACCESS, SECRET = "tester", "not-a-secret"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(folder: Path, config: Path, port: int) -> list[str]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
    ports = [f"-{name}.port={_free_port()}" for name in ("master", "volume", "filer")]
    ports += [f"-{name}.port.grpc={_free_port()}" for name in ("master", "volume", "filer", "s3")]
    address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
    s3 = ["-filer", "-s3", f"-s3.port={port}", f"-s3.config={config}"]
    quick = [
        "-master.electionTimeout=1s",
        "-master.telemetry=false",
        "-volume.max=40",
        "-master.volumeSizeLimitMB=64",
    ]
    return [weed, "server", *address, *s3, *ports, *quick]


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a SeaweedFS server with one user and one bucket; credentials are put into the environment."""
    import fsspec

    folder = tmp_path_factory.mktemp("s3")
    config = folder / "s3.json"
    credentials = [{"accessKey": ACCESS, "secretKey": SECRET}]
    config.write_text(
        json.dumps({"identities": [{"name": ACCESS, "credentials": credentials, "actions": ["Admin"]}]})
    )
    port = _free_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    url = f"http://127.0.0.1:{port}"
    (folder / "data").mkdir()
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(_command(folder / "data", config, port), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                fs = fsspec.filesystem("s3", endpoint_url=url, skip_instance_cache=True)
                fs.mkdir(BUCKET)
                break
            except Exception:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
        yield url
    finally:
        server.kill()
        server.wait()
        patch.undo()


@pytest.fixture
def s3_store(s3_endpoint: str) -> StoreConfig:
    """A store in a prefix of its own on the real server."""
    path = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    return StoreConfig(path=path, endpoint_url=s3_endpoint, path_style=True)


@pytest.fixture
def local_store(tmp_path: Path) -> StoreConfig:
    """A store in a directory."""
    return StoreConfig(path=str(tmp_path / "store"))
