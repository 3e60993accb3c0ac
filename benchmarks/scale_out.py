"""Sampling on two workers beside one, and a worker that is killed half-way.

    python benchmarks/scale_out.py [--seconds 240] [--output benchmarks/results/scale_out.json]

A server as `make serve` starts it, its deployments, and workers of the pool gpu as `make workers` starts
them, all on this machine; the demo with the fake engine, whose rows take a fixed time, through the deployment
`precompute` into a fresh store each. `--seconds` is what the stage's rows take on one worker. Measured is the
stage `sample references`, from the server's own record: starts of runs and of engines included.

Killed: two workers, one of which gets SIGKILL with the run that it works on when a third of the rows are
there.
Goals: two workers take at most 0.55 of the time of one; the killed run is Crashed within 180 s, everything
completes, and no row but those of the block in flight is computed twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from _result import ROOT, about, options, publish

from qrpo_core.config import Experiment
from qrpo_core.config.form import whole
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace

_PROMPTS, _REFERENCES, _BLOCK = 60, 20, 24
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def experiment(store: Path, seconds: float) -> Experiment:
    """1,200 references that take `seconds` in all; what follows them is as small as it can be."""
    overrides = [
        f"store.path={store}",
        f"store.rows_per_block={_BLOCK}",
        f"sampling.references_per_prompt={_REFERENCES}",
        "sampling.engine=fake",
        f"fake.seconds_per_row={seconds / (_PROMPTS * _REFERENCES)}",
        "sampling.max_new_tokens=8",
        "reward={kind: length, max_words: 1}",
        "training_data={mode: random, count: 1}",
        "prompts.templates=['Number {n}']",
        f"prompts.words={{n: {[str(n) for n in range(200)]}}}",
        "prompts.size=200",
        f"prompts.limit={2 * _PROMPTS}",
        "prompts.held_out=0.5",
    ]
    return load_experiment(ROOT / "experiments/demo.yaml", overrides)


class Service:
    """A server with the deployments; workers come and go."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = {**kept, "PREFECT_HOME": str(folder), "PREFECT_SERVER_API_PORT": str(port)}
        self.log = (folder / "log").open("wb")
        self.server = self.start("flows.service.serve")
        self.environment["PREFECT_API_URL"] = self.url
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    break
            time.sleep(0.2)
        subprocess.run(
            [sys.executable, "-m", "flows.service.deploy"],
            cwd=ROOT,
            env=self.environment,
            check=True,
            stdout=self.log,
        )

    def start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        """`python -m MODULE` in the background."""
        command = [sys.executable, "-m", module, *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    @contextlib.contextmanager
    def workers(self, count: int) -> Iterator[None]:
        """So many workers of the pool gpu, one of cpu, online."""
        started = self.start("flows.service.workers", *map(str, range(count)))
        while self.online() != count:
            time.sleep(0.2)
        try:
            yield
        finally:
            started.terminate()
            started.wait()
            for worker in self.ask(
                "/work_pools/gpu/workers/filter"
            ):  # else it counts as online for 90 s more
                httpx.delete(
                    f"{self.url}/work_pools/gpu/workers/{worker['name']}", timeout=60
                ).raise_for_status()

    def online(self) -> int:
        """Workers of the pool gpu that the server takes for alive."""
        found = self.ask("/work_pools/gpu/workers/filter")
        return sum(worker["status"] == "ONLINE" for worker in found)

    def ask(self, path: str, **body: Any) -> Any:
        """The answer of the API; a database that is locked is asked again."""
        while (answer := httpx.post(f"{self.url}{path}", json=body, timeout=60)).status_code == 503:
            time.sleep(0.5)
        return answer.raise_for_status().json()

    def precompute(self, wanted: Experiment) -> str:
        """Start the deployment; id of the run."""
        found = self.ask("/deployments/filter", deployments={"name": {"any_": ["precompute"]}})[0]
        parameters = {"experiment": whole(wanted)}
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def run(self, run: str) -> dict[str, Any]:
        """A flow run."""
        return dict(self.ask("/flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0])

    def end(self, run: str) -> str:
        """Wait for the end of a run; the type of its state."""
        while (state := str(self.run(run)["state_type"])) not in _ENDED:
            time.sleep(0.5)
        return state

    def shares(self) -> list[dict[str, Any]]:
        """Runs of sample-shard, the oldest first."""
        found = self.ask("/flow_runs/filter", flows={"name": {"any_": ["sample-shard"]}})
        return sorted(found, key=lambda run: str(run["created"]))


def stage_seconds(service: Service, run: str) -> float:
    """Time of the stage `sample references`, from the table that the run published."""
    import json

    wanted = {"flow_run_id": {"any_": [run]}, "key": {"any_": ["stages"]}}
    (table,) = service.ask("/artifacts/filter", artifacts=wanted)
    rows = json.loads(table["data"]) if isinstance(table["data"], str) else table["data"]
    return next(float(row["seconds"]) for row in rows if row["stage"] == "sample references")


def bought(wanted: Experiment) -> tuple[int, int]:
    """Reference rows in the store: different ones, and in all."""
    workspace = Workspace(wanted)
    rows = [
        (row_range.key, index)
        for block in workspace.blocks.committed(reference_steps(workspace)[0].recipe)
        for row_range in block.ranges
        for index in range(row_range.first, row_range.first + row_range.count)
    ]
    return len(set(rows)), len(rows)


def killed(service: Service, wanted: Experiment) -> dict[str, Any]:
    """Kill a worker with its run when a third of the rows are there."""
    run = service.precompute(wanted)
    before = {share["id"] for share in service.shares()}
    total = 0
    while not total or bought(wanted)[0] < total / 3:
        if (state := service.run(run)["state_type"]) in _ENDED:
            raise RuntimeError(f"the run is {state} before a third of its rows was there")
        time.sleep(1)
        with contextlib.suppress(Exception):  # the store is not there yet
            total = sum(map(len, reference_steps(Workspace(wanted))[0].wanted.values()))
    victim = next(s for s in service.shares() if s["id"] not in before and s["state_type"] == "RUNNING")
    at = time.monotonic()
    for process in (worker_of(victim["id"]), process_of(victim["id"])):
        os.kill(process, signal.SIGKILL)
    while service.run(victim["id"])["state_type"] not in _ENDED:
        time.sleep(0.5)
    crashed = time.monotonic() - at
    return {
        "state": service.end(run),
        "dead_run_state": service.run(victim["id"])["state_type"],
        "dead_run_crashed_after_seconds": round(crashed, 1),
        "rows": dict(zip(("different", "in_all"), bought(wanted), strict=True)),
        "rows_in_flight_at_most": _BLOCK,
    }


def process_of(run: str) -> int:
    """The process that leads the group of a flow run."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            process = int(folder.name)
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"PREFECT__FLOW_RUN_ID={run}".encode() in environment and os.getpgid(process) == process:
                return process
    raise LookupError(run)


def worker_of(run: str) -> int:
    """The worker that started a run's process."""
    stat = Path(f"/proc/{process_of(run)}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def measure(seconds: float) -> dict[str, Any]:
    """One worker, two, and two of which one is killed."""
    result: dict[str, Any] = {"work_seconds": seconds}
    with tempfile.TemporaryDirectory(prefix="qrpo-scale-out-") as scratch:
        (home := Path(scratch) / "prefect").mkdir()
        service = Service(home)
        try:
            for count in (1, 2):
                wanted = experiment(Path(scratch) / f"store-{count}", seconds)
                with service.workers(count):
                    run = service.precompute(wanted)
                    state = service.end(run)
                rows, in_all = bought(wanted)
                result[f"{count}_workers"] = {
                    "state": state,
                    "rows": {"different": rows, "in_all": in_all},
                    "stage_seconds": stage_seconds(service, run),
                }
            wanted = experiment(Path(scratch) / "store-killed", seconds)
            with service.workers(2):
                result["killed"] = killed(service, wanted)
        finally:
            service.server.terminate()
            service.server.wait()
    one, two = (result[f"{count}_workers"]["stage_seconds"] for count in (1, 2))
    return {**result, "two_over_one": round(two / one, 3)}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=240.0)
    arguments = parser.parse_args()
    goals = {"two_over_one": 0.55, "dead_run_crashed_after_seconds": 180}
    head = about("rows computed by the workers of a pool", goals=goals)
    publish(head | measure(arguments.seconds), arguments.output)


if __name__ == "__main__":
    main()
