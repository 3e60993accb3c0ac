"""Deployments on a real server, and runs of them by a real process worker."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from flows import deploy as module
from flows.deploy import POOLS, ROOT, create_pools, enter_checkout, form_defaults, service_url
from flows.server import PrefectServer
from flows.workers import LIMITS
from qrpo_core.config import Experiment
from qrpo_core.errors import QRPOError
from qrpo_core.experiments import load_experiment
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.workspace import Workspace

DEMO = load_experiment(ROOT / "experiments/demo.yaml")
#: Name (of the flow and of the deployment), entrypoint, tags.
EXPECTED = {
    "align": ("flows/align.py:align", {"qrpo", "sampling", "training", "evaluation"}),
    "precompute": ("flows/precompute.py:precompute", {"qrpo", "sampling"}),
    "train": ("flows/train.py:train", {"qrpo", "training"}),
    "evaluate": ("flows/evaluate.py:evaluate", {"qrpo", "sampling", "evaluation"}),
    "top-up": ("flows/top_up.py:top_up", {"qrpo", "sampling", "nightly"}),
}


def ask(server: PrefectServer, method: str, path: str, **body: Any) -> Any:
    """A request to the API; its answer, or an AssertionError with what the server said."""
    answer = httpx.request(method, f"{server.url}{path}", json=body or None, timeout=30)
    assert answer.is_success, answer.text
    return answer.json()


def start(server: PrefectServer, deployment: str, experiment: dict[str, Any]) -> str:
    """Create a run of a deployment, as the button of the UI does; its id."""
    found = ask(server, "GET", f"/deployments/name/{deployment}/{deployment}")
    path = f"/deployments/{found['id']}/create_flow_run"
    return str(ask(server, "POST", path, parameters={"experiment": experiment})["id"])


def end(server: PrefectServer, run: str, log: Path, seconds: float = 90) -> dict[str, Any]:
    """Wait until a run has ended; the run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found: dict[str, Any] = ask(server, "GET", f"/flow_runs/{run}")
        if found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return found
        time.sleep(0.3)
    raise AssertionError(f"still {found['state']}\n{log.read_text()}")


def lines(server: PrefectServer, run: str) -> list[str]:
    """The run's log."""
    wanted = {"flow_run_id": {"any_": [run]}}
    return [entry["message"] for entry in ask(server, "POST", "/logs/filter", logs=wanted)]


def references(experiment: Experiment) -> Counter[int]:
    """How many prompts have how many references in the store, counted there."""
    workspace = Workspace(experiment)
    rows: Counter[str] = Counter()
    for block in workspace.blocks.committed(reference_steps(workspace)[0].recipe):
        for run in block.runs:
            rows[run.key] += run.count
    return Counter(rows.values())


@pytest.mark.slow
def test_what_the_command_puts_on_the_server(server: PrefectServer, deployed: str) -> None:
    assert [line for line in deployed.splitlines() if line.startswith("Work pool")] == [
        "Work pool cpu created.",
        "Work pool gpu created.",
    ]
    found = {d["name"]: d for d in ask(server, "POST", "/deployments/filter")}
    assert set(found) == set(EXPECTED)
    for name, (entrypoint, tags) in EXPECTED.items():
        deployment = found[name]
        assert deployment["entrypoint"] == entrypoint
        assert set(deployment["tags"]) == tags
        assert deployment["work_pool_name"] == "gpu"
        assert not deployment["paused"]
        assert deployment["enforce_parameter_schema"]
        assert len(deployment["description"]) > 40
        # The form begins with the demo, whole; what it sends back is the demo.
        assert deployment["parameters"] == {"experiment": DEMO.model_dump(mode="json")}
        assert Experiment.model_validate(deployment["parameters"]["experiment"]) == DEMO
        # No path of this machine: any worker has its own checkout.
        assert deployment["pull_steps"] == [{"flows.deploy.enter_checkout": {}}]
        assert str(ROOT) not in str({**deployment, "parameter_openapi_schema": None})
        schedules = [(s["schedule"]["cron"], s["active"]) for s in deployment["schedules"]]
        assert schedules == ([("0 2 * * *", False)] if name == "top-up" else [])
    assert ask(server, "POST", "/flow_runs/filter") == []  # nothing is scheduled


@pytest.mark.slow
def test_a_second_time_changes_nothing(server: PrefectServer, deployed: str) -> None:
    before = {d["name"]: d["id"] for d in ask(server, "POST", "/deployments/filter")}
    assert create_pools(server.url) == []
    from tests_deploy import deploy  # replaced below
    assert "created." not in deploy()
    assert {d["name"]: d["id"] for d in ask(server, "POST", "/deployments/filter")} == before
