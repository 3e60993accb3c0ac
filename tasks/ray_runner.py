"""Compute missing rows on a Ray cluster, in processes that keep their engine for the whole run.

Each process is a Ray actor that holds its GPUs until the run ends and computes one shard of every stage. The
package prefect-ray submits Ray tasks instead. Their processes can be kept (max_calls=0), but Ray assigns GPUs
anew at every call, so a kept engine would stay on a device that Ray gives to another process.

Needs the extra `ray`, which is imported when a row is missing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import serialize_context
from prefect.task_engine import run_task_sync

from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.common.extras import require
from qrpo_core.config import Experiment
from qrpo_core.engines.kinds import kind_of
from qrpo_core.pipeline import shards
from qrpo_core.store.blocks.planning import RowRange
from tasks.dispatch import RowsToCompute, count_in, dispatch_until_complete
from tasks.progress import announce_problem, stage_progress
from tasks.row_stages import retry_damaged, row_stage
from tasks.spending import spending
from tasks.stages import workspace_of

#: Seconds between polls of the store, and the longest wait for a process to exit by itself.
POLL_SECONDS, EXIT_SECONDS = 2.0, 30.0
#: Attempts in a row that may lose processes without adding a row to the store.
MAX_FRUITLESS_ATTEMPTS = 3
_ADDRESS = re.compile(r"ray://[^/:]+:\d+")


class OnRay:
    """Computes missing rows on a Ray cluster; a call returns their number.

    address : ray://HOST:PORT of the cluster's Ray Client server; None: the cluster of RAY_ADDRESS or of this
        machine, else a local one that ends with the run.

    The processes and their engines live from the first missing row until the context exits. Raises
    ConfigError without the package, the cluster, or enough GPUs on a node; QRPOError where a shard fails
    without having added a row, or where computed rows are not in this run's store.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is not None and not _ADDRESS.fullmatch(address):
            raise ConfigError(
                f"{address!r} is not the address of a Ray cluster",
                where="pool",
                remedy="ray, or ray://HOST:PORT",
            )
        self._address = address
        self._connected_here = False
        self._processes: list[Any] = []

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """End the processes: at once if the run failed, else after their last reports to the server."""
        self._end(at_once=kind is not None)
        if self._connected_here:
            _ray().shutdown()
            self._connected_here = False

    def __call__(self, missing: RowsToCompute) -> int:
        def dispatch(left: Sequence[RowRange]) -> list[Exception]:
            self._start(missing.workspace.given)
            return self._compute(missing, left)

        return dispatch_until_complete(missing, dispatch, _check)

    def _start(self, experiment: Experiment) -> None:
        """Start a process for every shard, unless they run already."""
        if self._processes:
            return
        ray = _ray()
        if not ray.is_initialized():
            _connect(self._address)
            self._connected_here = True
        count, options = process_layout(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], experiment
        )
        actor = ray.remote(_Process).options(**options)
        self._processes = [actor.remote() for _ in range(count)]

    def _compute(self, missing: RowsToCompute, rows: Sequence[RowRange]) -> list[Exception]:
        """Compute these rows, a shard in each process; returns the errors of failed shards."""
        ray = _ray()
        experiment, context = missing.workspace.given.model_dump_json(), serialize_context()
        split = shards.split(missing.step, rows, len(self._processes))
        open_ = [
            process.compute.remote(experiment, shard.model_dump_json(), context)
            for process, shard in zip(self._processes, split, strict=False)
        ]
        calls, left = list(open_), count_in(rows)
        with stage_progress(missing.step.label, left, machines=len(calls)) as advance:
            while open_:
                _, open_ = ray.wait(open_, num_returns=len(open_), timeout=POLL_SECONDS)
                now = count_in(missing.still_missing())
                advance(max(0, left - now))
                left = min(left, now)
                spending.check(missing.step.label)  # above the cap: the processes end with the run
        failures = [failure for call in calls if (failure := _failure(call)) is not None]
        if any(not isinstance(failure, QRPOError) for failure in failures):
            # All processes, so that each new one gets devices that no old one still holds.
            self._end(at_once=True)
        return failures

    def _end(self, at_once: bool) -> None:
        """End the processes, and with them their engines."""
        processes, self._processes = self._processes, []
        if not processes:
            return
        ray = _ray()
        if not at_once:  # at exit they send their last events to the Prefect server
            ray.wait(
                [process.__ray_terminate__.remote() for process in processes],
                num_returns=len(processes),
                timeout=EXIT_SECONDS,
            )
        for process in processes:
            ray.kill(process)


def process_layout(
    nodes: Sequence[Mapping[str, float]], experiment: Experiment
) -> tuple[int, dict[str, Any]]:
    """The number of processes for a cluster, and the Ray options of each.

    nodes : the resources of each node, as Ray counts them ("CPU", "GPU").

    One process for each GPU of the cluster; with vLLM, one for each group of GPUs on a node that its engines
    need; without GPUs, one for each node with CPUs. Raises ConfigError where no node has room.
    """
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        wanted = max(1, kind_of(experiment).gpus(experiment, visible=()))
        count = sum(int(node.get("GPU", 0)) // wanted for node in nodes)
        if not count:
            raise ConfigError(
                f"the engines need {wanted} GPUs on one node, and no node of the Ray cluster has them",
                where="vllm.engines, vllm.tensor_parallel_size",
                remedy="lower one of them, or add a node that has them",
            )
        return count, {"num_gpus": wanted, "num_cpus": 0}
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise ConfigError("no node of the Ray cluster has a CPU or a GPU", where="pool", remedy="add a node")
    return len(cores), {"num_cpus": min(cores), "scheduling_strategy": "SPREAD"}


class _Process:
    """The actor that `compute_shard` runs in. Between calls the process keeps its workspace."""

    def compute(self, experiment: str, shard: str, context: dict[str, Any]) -> dict[str, int]:
        """Compute a shard as a task run of the calling flow run; experiment and shard are JSON."""
        parameters = {"experiment": json.loads(experiment), "shard": json.loads(shard)}
        return run_task_sync(compute_shard, parameters=parameters, context=context)


@task(name="shard", task_run_name="shard of {shard[stage]}", cache_policy=NO_CACHE)
def compute_shard(experiment: dict[str, Any], shard: dict[str, Any]) -> dict[str, int]:
    """Compute and commit the missing rows of a shard with the workspace and engine of this process."""
    workspace = workspace_of(Experiment.model_validate(experiment))
    wanted = shards.Shard.model_validate(shard)
    stage, _ = retry_damaged(lambda: row_stage(workspace, shards.step_of(workspace, wanted)))
    return {"reused": stage.reused, "computed": stage.computed}


def _ray() -> Any:
    """The optional package."""
    require("ray", "pool 'ray'", where="pool")
    import ray

    return ray


def _connect(address: str | None) -> None:
    """Join the cluster; start a local one where no address is given and none runs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, handler = _ray(), signal.getsignal(signal.SIGTERM)
    try:  # Prefect sends the processes' logs to the flow run
        ray.init(address, namespace="qrpo", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS')}: {error}",
            where="pool",
            remedy="give the address of its Ray Client server, such as ray://head:10001",
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray replaces Prefect's handler, which ends a run cleanly


def _failure(call: Any) -> Exception | None:
    """The error of a failed shard: its QRPOError, or Ray's error for a lost process; None if it finished."""
    try:
        _ray().get(call)
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray wraps the shard's error with its remote traceback
        return cause if isinstance(cause, QRPOError) else error
    return None


def _check(failures: Sequence[Exception], fruitless: int) -> None:
    """Raise where another attempt makes no sense. fruitless : attempts in a row that added no row."""
    ray = _ray()
    for failure in failures:
        lost = isinstance(failure, ray.exceptions.RayError)
        lost = lost and not isinstance(failure, ray.exceptions.RayTaskError)  # an error of the code
        if fruitless and isinstance(failure, QRPOError):
            raise failure
        if fruitless and (not lost or fruitless >= MAX_FRUITLESS_ATTEMPTS):
            raise QRPOError(
                f"a shard did not finish on the Ray cluster ({type(failure).__name__}: {failure})",
                remedy="committed rows stay, and the next run computes the others",
            ) from failure
        announce_problem(f"{type(failure).__name__}: {failure}; its missing rows are split again")
    if fruitless and not failures:
        raise QRPOError(
            "the Ray cluster has computed the missing rows, and they are not in this run's store",
            remedy="use a store that every node reaches: S3, or a shared folder by its absolute path",
        )
