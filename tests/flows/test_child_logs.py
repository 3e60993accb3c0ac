"""What training processes and engines print stands in the log of the run that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flows.service.deploy import ROOT
from flows.service.server import PrefectServer
from flows.service.workers import _ENVIRONMENT

pytestmark = pytest.mark.slow

#: A run as a worker has it, with a child that prints, followed as torchrun's and vLLM's logs are.
RUN = """
import logging, subprocess, sys
from pathlib import Path
from prefect import flow, task
from qrpo_core.common.log_tail import LogTail
from tasks.progress import show_core_logs

log = Path(sys.argv[1])

@task
def work():
    follower = LogTail(log, logging.getLogger("qrpo.vllm"))
    with log.open("wb") as out:
        says = "print('loading shard 1'); print('ready')"
        subprocess.run([sys.executable, "-c", says], stdout=out, check=True)
    follower.close()

@flow(name="with-a-child")
def run():
    show_core_logs()
    work()

run()
"""


def test_lines_of_a_child_are_in_the_log_of_its_run(server: PrefectServer, tmp_path: Path) -> None:
    environment = {**os.environ, **_ENVIRONMENT, "PREFECT_API_URL": server.url}
    command = [sys.executable, "-c", RUN, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    wanted = {"flows": {"name": {"any_": ["with-a-child"]}}}
    (run,) = httpx.post(f"{server.url}/flow_runs/filter", json=wanted, timeout=30).json()
    deadline, said = time.monotonic() + 120, []
    while "ready" not in said and time.monotonic() < deadline:
        logs = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
        entries = httpx.post(f"{server.url}/logs/filter", json=logs, timeout=30).json()
        said = [entry["message"] for entry in entries if entry["name"] == "qrpo.vllm"]
        time.sleep(0.2)
    assert said == ["loading shard 1", "ready"]
