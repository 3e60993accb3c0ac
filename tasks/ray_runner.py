"""Missing rows computed on a Ray cluster, in processes that keep their engine for the whole of a run.

Each process is a Ray actor that holds its GPUs until the run has no more rows to compute, and takes one share
of every stage. An actor and not a task of Ray's (which is what prefect-ray submits): a task's process can be
kept too, with max_calls=0, but Ray deals the GPUs out anew at every call, so a kept engine would stay on a
device that Ray meanwhile gives to another process.

Needs the extra `ray`; nothing here imports it before a row is missing.
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

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, QRPOError
from qrpo_core.steps import shares
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import Run
from tasks.blocks import fill, in_waves, mended, missing_rows, rows_of
from tasks.progress import announce_problem, stage_progress
from tasks.stages import workspace_of

#: Seconds between looks at the store, and the longest that a process may take to end by itself.
_LOOK, _END = 2.0, 30.0
#: How often processes may be lost in a row, without a new row in the store.
_TRIES = 3
_ADDRESS = re.compile(r"ray://[^/:]+:\d+")


class OnRay:
    """Has the missing rows of steps computed on a Ray cluster; a call returns how many there are now.

    address : ray://HOST:PORT of the cluster's Ray Client server; None: the cluster that RAY_ADDRESS names or
        this machine is part of, else one that is started here and ends with the run.

    A context: its processes, engines loaded, live from the first missing row until it is left. Raises
    ConfigError without the package, the cluster, or enough GPUs on a node; QRPOError where a share fails
    without having brought anything, and where what was computed is not in the store.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is not None and not _ADDRESS.fullmatch(address):
            raise ConfigError(
                f"{address!r} is no address of a Ray cluster", where="pool", remedy="ray, or ray://HOST:PORT"
            )
        self._address = address
        self._connected_here = False
        self._processes: list[Any] = []

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """End the processes: at once if the run failed or was interrupted, else when they have reported."""
        self._end(at_once=kind is not None)
        if self._connected_here:
            _ray().shutdown()
            self._connected_here = False

    def __call__(self, workspace: Workspace, step: BlockStep, missing: Sequence[Run]) -> int:
        def wave(left: Sequence[Run]) -> list[Exception]:
            self._start(workspace.experiment)
            return self._compute(workspace, step, left)

        return in_waves(workspace, step, missing, wave, _judge)

    def _start(self, experiment: Experiment) -> None:
        """Have a process for every share, if there are none yet."""
        if self._processes:
            return
        ray = _ray()
        if not ray.is_initialized():
            _connect(self._address)
            self._connected_here = True
        count, options = places([node["Resources"] for node in ray.nodes() if node["Alive"]], experiment)
        actor = ray.remote(_Process).options(**options)
        self._processes = [actor.remote() for _ in range(count)]

    def _compute(self, workspace: Workspace, step: BlockStep, missing: Sequence[Run]) -> list[Exception]:
        """Compute what is missing, a share in each process; returns how shares failed."""
        ray = _ray()
        experiment, context = workspace.experiment.model_dump_json(), serialize_context()
        split = shares.split(step, missing, len(self._processes))
        open_ = [
            process.compute.remote(experiment, share.model_dump_json(), context)
            for process, share in zip(self._processes, split, strict=False)
        ]
        calls, left = list(open_), rows_of(missing)
        with stage_progress(step.label, left, machines=len(calls)) as advance:
            while open_:
                _, open_ = ray.wait(open_, num_returns=len(open_), timeout=_LOOK)
                now = rows_of(missing_rows(workspace, step))
                advance(max(0, left - now))
                left = min(left, now)
        failures = [failure for call in calls if (failure := _failure(call)) is not None]
        if any(not isinstance(failure, QRPOError) for failure in failures):
            # All of them, not the lost ones alone: each then gets devices that no other process is still on.
            self._end(at_once=True)
        return failures

    def _end(self, at_once: bool) -> None:
        """End the processes, and with them their engines."""
        processes, self._processes = self._processes, []
        if not processes:
            return
        ray = _ray()
        if not at_once:  # at their exit they send what the Prefect server has not been told yet
            ray.wait(
                [process.__ray_terminate__.remote() for process in processes],
                num_returns=len(processes),
                timeout=_END,
            )
        for process in processes:
            ray.kill(process)


def places(nodes: Sequence[Mapping[str, float]], experiment: Experiment) -> tuple[int, dict[str, Any]]:
    """How many processes a cluster has room for, and what each of them asks of Ray.

    nodes : the resources of each node, as Ray counts them ("CPU", "GPU").

    One for each GPU of the cluster; with vLLM, for as many on one node as its engines need. Without GPUs one
    for each node that has CPUs. Raises ConfigError where no node has room.
    """
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        wanted = 1
        if experiment.sampling.engine == "vllm":
            wanted = (experiment.vllm.engines or 1) * experiment.vllm.tensor_parallel_size
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
    """The actor. It only says where `compute_share` runs: what is kept between calls is the workspace."""

    def compute(self, experiment: str, share: str, context: dict[str, Any]) -> dict[str, int]:
        """Compute a share as a task run of the flow run that asks. JSON, but for what Prefect knows of it."""
        parameters = {"experiment": json.loads(experiment), "share": json.loads(share)}
        return run_task_sync(compute_share, parameters=parameters, context=context)


@task(name="share", task_run_name="share of {share[stage]}", cache_policy=NO_CACHE)
def compute_share(experiment: dict[str, Any], share: dict[str, Any]) -> dict[str, int]:
    """Compute what is missing of a share and commit it, with the workspace and the engine of this process."""
    workspace = workspace_of(Experiment.model_validate(experiment))
    wanted = shares.Share.model_validate(share)
    (stage,) = mended(lambda: [fill(workspace, shares.step_of(workspace, wanted))])
    return {"reused": stage.reused, "computed": stage.computed}


def _ray() -> Any:
    """The package, which is optional."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "the package ray is not installed", where="pool", remedy="pip install 'qrpo[ray]'"
        ) from None
    return ray


def _connect(address: str | None) -> None:
    """Join the cluster; where there is none to join and none is named, start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, handler = _ray(), signal.getsignal(signal.SIGTERM)
    try:  # what the processes log goes to the flow run by itself
        ray.init(address, namespace="qrpo", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS')}: {error}",
            where="pool",
            remedy="give the address of its Ray Client server, such as ray://head:10001",
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own; Prefect's is what ends a run in order


def _failure(call: Any) -> Exception | None:
    """How a share ended that did not end well: its own QRPOError, or Ray's of a process that was lost."""
    try:
        _ray().get(call)
    except Exception as error:
        cause = getattr(error, "cause", None)  # Ray wraps what the share raised, with the trace of there
        return cause if isinstance(cause, QRPOError) else error
    return None


def _judge(failures: Sequence[Exception], fruitless: int) -> None:
    """Raise where it makes no sense to compute shares again. fruitless : times in a row without a new row."""
    ray = _ray()
    for failure in failures:
        lost = isinstance(failure, ray.exceptions.RayError)
        lost = lost and not isinstance(failure, ray.exceptions.RayTaskError)  # an error of the code
        if fruitless and isinstance(failure, QRPOError):
            raise failure
        if fruitless and (not lost or fruitless >= _TRIES):
            raise QRPOError(
                f"a share did not come to its end on the Ray cluster ({type(failure).__name__}: {failure})",
                remedy="what was committed stays, and the next run goes on from there",
            ) from failure
        announce_problem(f"{type(failure).__name__}: {failure}; what it left is shared out again")
    if fruitless and not failures:
        raise QRPOError(
            "the Ray cluster has computed the missing rows, and they are not in this run's store",
            remedy="use a store that every node reaches: S3, or a folder that they share, by its whole path",
        )
