"""What workers do for a service: shards of missing rows, what follows a run, what a schedule starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.service.deploy import ROOT
from flows.service.workers import _MIN_LIFETIME, _children
from qrpo_core.config import Experiment
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps, stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tasks.events import PRECOMPUTED, TRAINED

#: Of the 20 prompts; the others are held out, by the hash of each.
TRAINED_ON = 15
REFERENCES = 20

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Any]) -> Any:
    """A server with the deployments."""
    service = make_service(PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2")  # default 60
    service.serve()
    service.run("flows.service.deploy")
    return service


@pytest.fixture(scope="module")
def workers(service: Any) -> Any:
    """`make workers DEVICES="0 1"`: a worker of the pool cpu, two of the pool gpu."""
    started = service.start("flows.service.workers", "0", "1")
    online(service, gpu=2, cpu=1)
    return started


def online(service: Any, **wanted: int) -> None:
    """Wait until so many workers of the pools are online."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found = {
            pool: Counter(w["status"] for w in service.ask("POST", f"/work_pools/{pool}/workers/filter"))
            for pool in wanted
        }
        if all(found[pool]["ONLINE"] == count for pool, count in wanted.items()):
            return
        time.sleep(0.3)
    raise AssertionError((found, service.log("flows.service.workers").read_text()))


def begin(service: Any, deployment: str, path: Path, **more: Any) -> str:
    return str(service.begin(deployment, load_experiment(path).model_dump(mode="json"), **more))


def shards(service: Any, experiment: Experiment) -> list[dict[str, Any]]:
    """The runs of shards of an experiment, by start."""
    found = service.ask("POST", "/flow_runs/filter", flow_runs={"tags": {"all_": ["shard"]}})
    mine = [run for run in found if run["parameters"]["experiment"]["store"]["path"] == experiment.store.path]
    return sorted(mine, key=lambda run: run["expected_start_time"])


def bought(experiment: Experiment) -> dict[str, Counter[tuple[str, int]]]:
    """How often each row stands in the blocks of each stage before training."""
    workspace = Workspace(experiment)
    round_ = stored_steps(workspace).first
    return {
        step.label: Counter(
            (row_range.key, index)
            for block in workspace.blocks.committed(step.recipe)
            for row_range in block.ranges
            for index in range(row_range.first, row_range.first + row_range.count)
        )
        for step in (*round_.row_steps, round_.logprobs)
    }


def slow(write_experiment: Callable[..., Path], name: str, seconds: float, **changed: Any) -> Path:
    """300 references; a block is a second of work."""
    sampling = {"engine": "fake", "references_per_prompt": REFERENCES, "max_new_tokens": 12}
    path = write_experiment(name, sampling=sampling, fake={"seconds_per_row": seconds}, **changed)
    text = path.read_text().replace("store:\n", "store:\n  block_minutes: 0.016\n  rows_per_block: 16\n")
    path.write_text(text)
    return path


def test_two_workers_share_each_stage_and_one_that_is_killed_costs_nothing_but_its_block(
    service: Any, workers: Any, write_experiment: Callable[..., Path]
) -> None:
    path = slow(write_experiment, "shared", 0.15)
    begun = time.monotonic()
    run = begin(service, "precompute", path)
    experiment = load_experiment(path)
    service.said(run, "^  prepare prompts ")
    workspace = Workspace(experiment)
    step = reference_steps(workspace)[0]
    deadline = time.monotonic() + 600
    # `make workers` takes one that ends in its first seconds for one that would end again.
    while len(workspace.blocks.committed(step.recipe)) < 4 or time.monotonic() < begun + _MIN_LIFETIME:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first, second = shards(service, experiment)
    assert [shard["name"].partition(" (")[0] for shard in (first, second)] == [
        "sample references, shard 1 of 2",
        "sample references, shard 2 of 2",
    ]
    victim = first if first["state_type"] == "RUNNING" else second
    its_process = process_of(victim["id"])
    os.kill(worker_of(its_process), signal.SIGKILL)

    state = service.end(run, 1200)
    assert state[0] == "COMPLETED", (state, service.log("flows.service.workers").read_text())
    found = bought(experiment)
    assert set(found) == {"sample references", "annotate references", "score reference log-probs"}
    # Each row once: what the dead one had committed is not computed again, and the others did not overlap.
    assert all(set(rows.values()) == {1} for rows in found.values())
    assert all(len(rows) == TRAINED_ON * REFERENCES for rows in found.values())
    assert service.state(victim["id"])[0] == "CRASHED"
    assert not Path(f"/proc/{its_process}").exists()
    told = service.log("flows.service.workers").read_text()
    assert re.search(r"error: worker gpu . ended by itself with status -9", told)
    assert len(_children(workers.pid)) == 3  # and it was started again
    service.said(run, "shard . of 2 .* its missing rows are split again", seconds=120)
    made = Counter(shard["parameters"]["shard"]["stage"] for shard in shards(service, experiment))
    assert made["sample references"] > 2  # those that came for the dead one
    assert made["annotate references"] == made["score reference log-probs"] == 2
    assert all(shard["parent_task_run_id"] for shard in shards(service, experiment))  # shown below their run


def process_of(run: str) -> int:
    """The process that a flow run has for itself: the leader of its group."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PREFECT__FLOW_RUN_ID={run}".encode() in environment and os.getpgid(int(folder.name)) == int(
            folder.name
        ):
            return int(folder.name)
    raise AssertionError(f"no process of {run}")


def worker_of(process: int) -> int:
    """The worker that started the process of a run."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(
    ("event", "then", "flow", "next_then"),
    [
        (PRECOMPUTED, "stop", None, None),
        (PRECOMPUTED, "train", "train", "stop"),
        (PRECOMPUTED, "train, evaluate", "train", "evaluate"),
        (TRAINED, "stop", None, None),
        (TRAINED, "evaluate", "evaluate", None),
    ],
)
def test_what_follows_a_run_starts_by_itself_if_it_is_asked_for(
    service: Any,
    write_experiment: Callable[..., Path],
    event: str,
    then: str,
    flow: str | None,
    next_then: str | None,
) -> None:
    """The event that the flows emit at their end; no worker is needed to see the run that it starts."""
    experiment = load_experiment(write_experiment(f"{event}-{then.replace(', ', '-')}"))
    script = (
        f"from qrpo_core.config.reading import load_experiment; from tasks.events import emit_event; "
        f"emit_event({event!r}, "
    )
    script += f"load_experiment({str(write_experiment(experiment.name))!r}), {then!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=service.client, check=True, timeout=600)

    def started() -> list[dict[str, Any]]:
        found = service.ask("POST", "/flow_runs/filter", flow_runs={"tags": {"all_": ["qrpo"]}})
        given = [run["parameters"]["experiment"].get("settings", {}) for run in found]
        return [run for run, each in zip(found, given, strict=True) if each.get("name") == experiment.name]

    deadline = time.monotonic() + (300 if flow else 3)
    while not (runs := started()) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert len(runs) == (flow is not None)
    for run in runs:
        assert Experiment.model_validate(run["parameters"]["experiment"]["settings"]) == experiment
        assert run["parameters"].get("then") == next_then
        assert service.ask("GET", f"/flows/{run['flow_id']}")["name"] == flow
        service.ask("DELETE", f"/flow_runs/{run['id']}")


def test_the_nightly_top_up_fires_by_itself_and_adds_what_is_missing(
    service: Any, workers: Any, write_experiment: Callable[..., Path]
) -> None:
    small = {"engine": "fake", "references_per_prompt": 2, "max_new_tokens": 12}
    path = write_experiment("nightly", sampling=small)
    service.run("flows.cli", "run", str(path), "--flow", "precompute")
    path = write_experiment("nightly", sampling=small | {"references_per_prompt": 5})
    experiment = load_experiment(path)
    before = bought(experiment)["sample references"]
    assert len(before) == 2 * TRAINED_ON

    service.run("flows.cli", "schedule", str(path), "--cron", "0 2 * * *")
    found = service.ask("GET", "/deployments/name/top-up/top-up")
    (nightly,) = found["schedules"]
    # Night is in 15 seconds, by the clock of the server.
    at = datetime.now(UTC) + timedelta(seconds=15)
    changed = {
        "active": True,
        "schedule": {"interval": 86400, "anchor_date": at.isoformat(), "timezone": "UTC"},
        "parameters": nightly["parameters"],
    }
    service.ask("PATCH", f"/deployments/{found['id']}/schedules/{nightly['id']}", **changed)
    try:
        deadline = time.monotonic() + 600
        while True:
            runs = service.ask("POST", "/flow_runs/filter", flows={"name": {"any_": ["top-up"]}})
            first = min(runs, key=lambda run: run["expected_start_time"], default=None)
            if first is not None and first["state_type"] in ("COMPLETED", "FAILED", "CRASHED"):
                break
            assert time.monotonic() < deadline, runs
            time.sleep(0.3)
    finally:
        path_of = f"/deployments/{found['id']}/schedules/{nightly['id']}"
        service.ask("PATCH", path_of, active=False)
    assert first["state_type"] == "COMPLETED", service.log("flows.service.workers").read_text()
    assert first["auto_scheduled"]
    assert datetime.fromisoformat(first["expected_start_time"]) == at
    after = bought(experiment)["sample references"]
    assert set(after.values()) == {1}
    assert len(after) == 5 * TRAINED_ON
    assert before.keys() <= after.keys()
