"""Compute missing rows on the workers of a work pool, a shard in each of several flow runs.

The missing rows of a stage are split among the online workers. Each shard is a run of a deployment
(`sample-shard`, `annotate-shard`), which loads its engine once. When all runs have ended, the rows that the
store still lacks are split again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.config import Experiment
from qrpo_core.pipeline import shards
from qrpo_core.pipeline.row_steps import BlockStep, RewardStep
from qrpo_core.store.blocks.planning import RowRange
from tasks.dispatch import RowsToCompute, count_in, dispatch_until_complete
from tasks.progress import announce_problem, stage_progress
from tasks.row_stages import in_this_run
from tasks.spending import spending

#: The deployments of shards, as flow/deployment: for samples and log-probs, and for rewards.
SAMPLE, ANNOTATE = "sample-shard/sample-shard", "annotate-shard/annotate-shard"

#: Seconds between polls, and the longest time that the server may be unreachable.
POLL_SECONDS, SERVER_AWAY_SECONDS = 2.0, 900.0
#: How many attempts in a row may add no row.
MAX_FRUITLESS_ATTEMPTS = 3
#: States that end the wait. A run whose worker is gone stays Cancelling for ever.
ENDED_STATES = {
    StateType.COMPLETED,
    StateType.FAILED,
    StateType.CRASHED,
    StateType.CANCELLED,
    StateType.CANCELLING,
}


@dataclass(frozen=True)
class OnPool:
    """Computes missing rows on the workers of `pool`.

    This run computes them itself where no worker is online, and where it runs on that pool.

    Raises ConfigError where the server lacks the pool or the deployments; QRPOError where a shard fails
    without having added a row, or is cancelled.
    """

    pool: str

    def __call__(self, missing: RowsToCompute) -> int:
        def dispatch(left: Sequence[RowRange]) -> list[FlowRun]:
            # Shards of a killed run keep running, and their rows must not be computed twice.
            step, experiment = missing.step, missing.workspace.given
            runs = self._running(step) or self._start(experiment, step, left)
            if runs:
                return self._wait(missing, runs)
            in_this_run(replace(missing, rows=left))
            return []

        return dispatch_until_complete(missing, dispatch, _check)

    def _running(self, step: BlockStep) -> list[UUID]:
        """Runs of shards of this recipe that an earlier run started and that have not ended."""
        wanted = {"tags": {"all_": [_tag(step)]}, "state": {"type": {"not_any_": sorted(ENDED_STATES)}}}
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
        if found:
            announce_problem(f"{step.label}: waiting for {len(found)} shards that were started before")
        return [run.id for run in found]

    def _start(self, experiment: Experiment, step: BlockStep, missing: Sequence[RowRange]) -> list[UUID]:
        """Start a shard for each online worker; [] where this run computes the rows."""
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
        split = shards.split(step, missing, workers)
        try:
            return [
                run_deployment(
                    name,
                    parameters={
                        "experiment": experiment.model_dump(mode="json"),
                        "shard": shard.model_dump(mode="json"),
                    },
                    flow_run_name=f"{step.label}, shard {number} of {len(split)} ({experiment.name})",
                    tags=[_tag(step)],
                    timeout=0,
                ).id
                for number, shard in enumerate(split, 1)
            ]
        except ObjectNotFound:
            raise ConfigError(f"the server has no deployment {name}", remedy="run make deploy") from None

    def _workers(self) -> int:
        """The number of online workers of the pool."""
        with get_client(sync_client=True) as client:
            try:
                client.read_work_pool(self.pool)  # the next call does not report a missing pool as such
                found = client.read_workers_for_work_pool(self.pool)
            except ObjectNotFound:
                raise ConfigError(
                    f"the server has no work pool {self.pool!r}",
                    where="pool",
                    remedy="set PREFECT_API_URL to the server that has it, or run make deploy there",
                ) from None
        return sum(worker.status == WorkerStatus.ONLINE for worker in found)

    def _wait(self, missing: RowsToCompute, runs: Sequence[UUID]) -> list[FlowRun]:
        """Wait until the runs have ended, and show progress; cancel them if this run is interrupted."""
        left = count_in(missing.still_missing())
        try:
            with (
                stage_progress(missing.step.label, left, machines=len(runs)) as advance,
                get_client(sync_client=True) as client,
            ):
                while True:
                    found = _retry_while_away(lambda: [client.read_flow_run(run) for run in runs])
                    now = count_in(missing.still_missing())
                    advance(max(0, left - now))
                    left = min(left, now)
                    spending.check(missing.step.label)
                    active = [run for run in found if run.state is None or run.state.type not in ENDED_STATES]
                    ended = [run for run in found if run not in active]
                    if not active:
                        return ended
                    if all(_scheduled(run) for run in active) and not self._workers():
                        _cancel([run.id for run in active])  # no worker is left to run them
                        return ended
                    time.sleep(POLL_SECONDS)
        except BaseException:
            _cancel(runs)
            raise


def _check(ended: Sequence[FlowRun], fruitless: int) -> None:
    """Raise where starting shards again makes no sense."""
    for run in ended:
        if run.state is None or run.state.type == StateType.COMPLETED:
            continue
        outcome = f"{run.name}: {run.state.name}, {run.state.message or 'no message'}"
        cancelled = run.state.type in (StateType.CANCELLED, StateType.CANCELLING)
        failed = run.state.type == StateType.FAILED and fruitless
        if cancelled or failed or fruitless >= MAX_FRUITLESS_ATTEMPTS:
            raise QRPOError(
                f"a shard did not finish ({outcome})",
                where=f"flow run {run.id}",
                remedy="read its log; committed rows stay, and the next run computes the others",
            )
        announce_problem(f"{outcome}; its missing rows are split again")
    if fruitless >= MAX_FRUITLESS_ATTEMPTS:
        raise QRPOError(
            f"{fruitless} times in a row, shards added no row to the store",
            remedy="see that this run and the workers use the same store: S3, or a folder that they share",
        )


def _scheduled(run: FlowRun) -> bool:
    return run.state is not None and run.state.type == StateType.SCHEDULED


def _cancel(runs: Sequence[UUID]) -> None:
    """Cancel the runs that have not ended."""
    with get_client(sync_client=True) as client:
        for run in runs:
            try:
                state = client.read_flow_run(run).state
                if state is not None and state.type not in ENDED_STATES:
                    client.set_flow_run_state(run, Cancelling())
            except httpx.HTTPError:  # the server is gone: they keep running, and the next run waits for them
                return


def _retry_while_away(request: Callable[[], list[FlowRun]]) -> list[FlowRun]:
    """The answer to a request, which is repeated while the server restarts."""
    deadline = time.monotonic() + SERVER_AWAY_SECONDS
    while True:
        try:
            return request()
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise
            announce_problem(f"the Prefect server does not answer ({error!r}); retrying")
            time.sleep(5 * POLL_SECONDS)


def _own_pool() -> str | None:
    """The work pool whose worker started this process; None in `qrpo run`."""
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not run:
        return None
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(run)).work_pool_name


def _tag(step: BlockStep) -> str:
    return f"shard:{step.recipe.key}"
