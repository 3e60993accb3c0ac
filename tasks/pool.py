"""Missing rows computed by other flow runs: shares of them on the workers of a work pool.

A stage's missing rows are split among the workers that are online, and each share is a run of a deployment
(`sample-share`, `annotate-share`), whose process loads its engine once. What is missing when they have ended,
whatever became of them, is split anew. Nobody keeps a list: the store says what there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, QRPOError
from qrpo_core.steps import shares
from qrpo_core.steps.blocks import BlockStep, RewardStep
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import Run
from tasks.blocks import Compute, in_this_run, in_waves, missing_rows, rows_of
from tasks.progress import announce_problem, stage_progress
from tasks.ray_runner import OnRay

#: The deployments that compute shares, as flow/deployment: of drawn rows and log-probs, and of rewards.
SAMPLE, ANNOTATE = "sample-share/sample-share", "annotate-share/annotate-share"

#: Seconds between looks at the shares, and the longest that the server may be away meanwhile.
_LOOK, _AWAY = 2.0, 900.0
#: How often shares may be started anew although those before them brought nothing.
_TRIES = 3
#: Those that are not waited for. What is being cancelled is never more than that if its worker is gone.
_ENDED = {
    StateType.COMPLETED,
    StateType.FAILED,
    StateType.CRASHED,
    StateType.CANCELLED,
    StateType.CANCELLING,
}


@contextmanager
def compute_on(pool: str | None) -> Iterator[Compute]:
    """Who computes missing rows: the workers of a pool, for None this run, for "ray" a Ray cluster.

    "ray://HOST:PORT" is a cluster elsewhere. Its processes end with the context; the others keep none.
    """
    if pool is None:
        yield in_this_run
    elif pool == "ray" or pool.startswith("ray://"):
        with OnRay(None if pool == "ray" else pool) as compute:
            yield compute
    else:
        yield OnPool(pool)


@dataclass(frozen=True)
class OnPool:
    """Has the missing rows of a step computed by the workers of `pool`; returns how many there are now.

    Where none is online, and where this run itself holds a place of the pool, they are computed here.

    Raises ConfigError where the server lacks the pool or the deployments; QRPOError where a share fails
    without having brought anything, or is cancelled.
    """

    pool: str

    def __call__(self, workspace: Workspace, step: BlockStep, missing: Sequence[Run]) -> int:
        def wave(left: Sequence[Run]) -> list[FlowRun]:
            # Those of a run that was killed go on: what they compute is not to be bought again.
            runs = self._running(step) or self._start(workspace.experiment, step, left)
            if runs:
                return self._wait(workspace, step, left, runs)
            in_this_run(workspace, step, left)
            return []

        return in_waves(workspace, step, missing, wave, _judge)

    def _running(self, step: BlockStep) -> list[UUID]:
        """Shares of this recipe that somebody has started and that have not ended."""
        wanted = {"tags": {"all_": [_tag(step)]}, "state": {"type": {"not_any_": sorted(_ENDED)}}}
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
        if found:
            announce_problem(f"{step.label}: waiting for {len(found)} shares that were started before")
        return [run.id for run in found]

    def _start(self, experiment: Experiment, step: BlockStep, missing: Sequence[Run]) -> list[UUID]:
        """Start a share for each worker that is online; none where rows are better computed here."""
        if _own_pool() == self.pool:
            announce_problem(f"this run is itself on the work pool {self.pool}, and computes {step.label}")
            return []
        workers = self._workers()
        if not workers:
            announce_problem(
                f"no worker of the work pool {self.pool} is online: {step.label} is computed here"
            )
            return []
        name = ANNOTATE if isinstance(step, RewardStep) else SAMPLE
        split = shares.split(step, missing, workers)
        try:
            return [
                run_deployment(
                    name,
                    parameters={
                        "experiment": experiment.model_dump(mode="json"),
                        "share": share.model_dump(mode="json"),
                    },
                    flow_run_name=f"{step.label}, share {number} of {len(split)} ({experiment.name})",
                    tags=[_tag(step)],
                    timeout=0,
                ).id
                for number, share in enumerate(split, 1)
            ]
        except ObjectNotFound:
            raise ConfigError(f"the server has no deployment {name}", remedy="run make deploy") from None

    def _workers(self) -> int:
        """How many workers of the pool are online."""
        with get_client(sync_client=True) as client:
            try:
                client.read_work_pool(self.pool)  # the next call does not tell a missing pool from an error
                found = client.read_workers_for_work_pool(self.pool)
            except ObjectNotFound:
                raise ConfigError(
                    f"the server has no work pool {self.pool!r}", where="pool", remedy="run make deploy"
                ) from None
        return sum(worker.status == WorkerStatus.ONLINE for worker in found)

    def _wait(
        self, workspace: Workspace, step: BlockStep, missing: Sequence[Run], runs: Sequence[UUID]
    ) -> list[FlowRun]:
        """Wait until the runs have ended, showing what the store gains; cancel them if this run is ended."""
        total = left = rows_of(missing)
        try:
            with (
                stage_progress(step.label, total, machines=len(runs)) as advance,
                get_client(sync_client=True) as client,
            ):
                while True:
                    found = _patiently(lambda: [client.read_flow_run(run) for run in runs])
                    now = rows_of(missing_rows(workspace, step))
                    advance(max(0, left - now))
                    left = min(left, now)
                    open_ = [run for run in found if run.state is None or run.state.type not in _ENDED]
                    ended = [run for run in found if run not in open_]
                    if not open_:
                        return ended
                    if all(_scheduled(run) for run in open_) and not self._workers():
                        _cancel([run.id for run in open_])  # nobody is left who would take them
                        return ended
                    time.sleep(_LOOK)
        except BaseException:
            _cancel(runs)
            raise


def _judge(ended: Sequence[FlowRun], fruitless: int) -> None:
    """Raise where it makes no sense to start shares again."""
    for run in ended:
        if run.state is None or run.state.type == StateType.COMPLETED:
            continue
        told = f"{run.name}: {run.state.name}, {run.state.message or 'no message'}"
        cancelled = run.state.type in (StateType.CANCELLED, StateType.CANCELLING)
        failed = run.state.type == StateType.FAILED and fruitless
        if cancelled or failed or fruitless >= _TRIES:
            raise QRPOError(
                f"a share did not come to its end ({told})",
                where=f"flow run {run.id}",
                remedy="read its log; what it committed stays, and the next run goes on from there",
            )
        announce_problem(f"{told}; what it left is shared out again")
    if fruitless >= _TRIES:
        raise QRPOError(
            f"{fruitless} times shares ended without a new row in the store",
            remedy="see that this run and the workers use the same store: S3, or a folder that they share",
        )


def _scheduled(run: FlowRun) -> bool:
    return run.state is not None and run.state.type == StateType.SCHEDULED


def _cancel(runs: Sequence[UUID]) -> None:
    """Ask the workers to end what has not ended."""
    with get_client(sync_client=True) as client:
        for run in runs:
            try:
                state = client.read_flow_run(run).state
                if state is not None and state.type not in _ENDED:
                    client.set_flow_run_state(run, Cancelling())
            except httpx.HTTPError:  # the server is gone, too: they go on, and the next run waits for them
                return


def _patiently(ask: Callable[[], list[FlowRun]]) -> list[FlowRun]:
    """The server's answer, also if it is restarted meanwhile."""
    deadline = time.monotonic() + _AWAY
    while True:
        try:
            return ask()
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise
            announce_problem(f"the Prefect server does not answer ({error!r}); asking again")
            time.sleep(5 * _LOOK)


def _own_pool() -> str | None:
    """The work pool whose worker started this process; None for `qrpo run`."""
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not run:
        return None
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(run)).work_pool_name


def _tag(step: BlockStep) -> str:
    return f"share:{step.recipe.key}"
