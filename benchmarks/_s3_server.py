"""A SeaweedFS server on loopback for benchmarks, with one user and one bucket, gone when they end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.s3 import S3Objects

BUCKET, ACCESS, SECRET = "benchmarks", "tester", "not-a-secret"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """URL of a server that keeps its data below `folder`; credentials are put into the environment."""
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    credentials = [{"accessKey": ACCESS, "secretKey": SECRET}]
    identities = [{"name": ACCESS, "credentials": credentials, "actions": ["Admin"]}]
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    port = _free_port()
    names = [f"{name}.port" for name in ("master", "volume", "filer")]
    names += [f"{name}.port.grpc" for name in ("master", "volume", "filer", "s3")]
    options = {name: _free_port() for name in names} | {
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "s3.port": port,
        "s3.config": folder / "s3.json",
        "master.electionTimeout": "1s",
        "master.telemetry": "false",
        "volume.max": 100,
        "master.volumeSizeLimitMB": 256,
    }
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
    command = [weed, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(url, server)
        yield url
    finally:
        server.kill()
        server.wait()


def _make_bucket(url: str, server: subprocess.Popen[bytes]) -> None:
    store = StoreConfig(path=f"s3://{BUCKET}/x", endpoint_url=url, path_style=True, retry_seconds=1)
    deadline = time.monotonic() + 120
    while True:
        try:
            S3Objects(store).client.create_bucket(Bucket=BUCKET)
            return
        except Exception:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.3)
