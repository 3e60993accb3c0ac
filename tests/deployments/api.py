"""What tests ask of a service: its API, runs of deployments, and what the store has."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from flows.service.server import PrefectServer
from qrpo_core.config import Experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace


def request(url: str, method: str, path: str, body: dict[str, Any], **more: Any) -> Any:
    """A request to the API under `url`; its answer, or an AssertionError with what the server said.

    more : of httpx.request, such as `auth` and `headers`.
    """
    for _ in range(20):
        answer = httpx.request(method, f"{url}{path}", json=body or None, timeout=30, **more)
        if answer.status_code != 503:  # "database is locked": Prefect's own client asks again, too
            break
        time.sleep(0.5)
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def ask(server: PrefectServer, method: str, path: str, **body: Any) -> Any:
    """A request to the API of a server."""
    return request(server.url, method, path, body)


def start(server: PrefectServer, deployment: str, experiment: dict[str, Any], **more: Any) -> str:
    """Start a run of an experiment, of which every setting is given; its id. more : further parameters."""
    return submit_form(server, deployment, {"settings": experiment}, **more)


def submit_form(server: PrefectServer, deployment: str, form: dict[str, Any], **more: Any) -> str:
    """Create a run of a deployment, as the button of the UI does; its id. more : further parameters."""
    found = ask(server, "GET", f"/deployments/name/{deployment}/{deployment}")
    path = f"/deployments/{found['id']}/create_flow_run"
    return str(ask(server, "POST", path, parameters={"experiment": form, **more})["id"])


def end(server: PrefectServer, run: str, log: Path, seconds: float = 600) -> dict[str, Any]:
    """Wait until a run has ended; the run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found: dict[str, Any] = ask(server, "GET", f"/flow_runs/{run}")
        if found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return found
        time.sleep(0.3)
    raise AssertionError(f"still {found['state']}\n{log.read_text()}")


def said(server: PrefectServer, run: str, pattern: str, seconds: float = 300) -> None:
    """Wait for a line of the run's log (they come in batches)."""
    deadline = time.monotonic() + seconds
    while True:
        entries = ask(server, "POST", "/logs/filter", logs={"flow_run_id": {"any_": [run]}})
        if any(re.search(pattern, entry["message"]) for entry in entries):
            return
        assert time.monotonic() < deadline, f"no {pattern!r} in {[entry['message'] for entry in entries]}"
        time.sleep(0.3)


def references(experiment: Experiment) -> Counter[int]:
    """How many prompts have how many references in the store, counted there."""
    workspace = Workspace(experiment)
    rows: Counter[str] = Counter()
    for block in workspace.blocks.committed(reference_steps(workspace)[0].recipe):
        for row_range in block.ranges:
            rows[row_range.key] += row_range.count
    return Counter(rows.values())
