"""Runs of deployments that a command asks a server for, through Prefect's own client.

That client repeats a request that meets a locked database or a server that restarts. A submission has a key
of its own, so that a repeated request starts one run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx

from flows.service.server import server_errors_in_one_line
from qrpo_core.common.errors import ConfigError, QRPOError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

#: Deployments that a user starts, in the order of the help.
DEPLOYMENTS = ("align", "precompute", "train", "evaluate", "compare", "pool-report", "top-up")
#: How Prefect's own lines in a run's log begin, which say nothing of the work.
_OF_PREFECT = (
    *("Running ", "Executing deployment step", "Deployment step", "All deployment steps"),
    *("Beginning ", "Finished in state Completed", "Worker '", "Flow run '"),
)
#: Of a part of a run only these loggers are heard, without their warnings: progress and warnings are in the
#: log of the run, too.
_OURS = "qrpo."
#: Prefect's last line in the log of a run that completed or failed.
_LAST = "Finished in state "
#: Seconds between looks at a run.
POLL_SECONDS = 2.0
#: Seconds that a run's log may take to reach the server after the run has ended: it is sent in parts.
LOG_SECONDS = 15.0


@dataclass(frozen=True)
class Submitted:
    """A run that the server has accepted. workers : how many of its work pool are online."""

    id: UUID
    name: str
    url: str
    pool: str
    workers: int


@contextmanager
def client_of(url: str) -> Iterator[SyncPrefectClient]:
    """A client of the server at the URL of its API; QRPOError in one line where the server fails."""
    from prefect.client.orchestration import get_client
    from prefect.settings import temporary_settings

    updates: dict[Any, Any] = {"api.url": url}
    with (
        temporary_settings(updates=updates),
        server_errors_in_one_line(url),
        get_client(sync_client=True) as client,
    ):
        yield client


def submit(url: str, deployment: str, parameters: dict[str, Any], name: str) -> Submitted:
    """Start a run of a deployment. Raises ConfigError without the deployment."""
    from prefect.client.schemas.objects import WorkerStatus

    with client_of(url) as client:
        found = deployment_of(client, deployment)
        run = client.create_flow_run_from_deployment(
            found.id, parameters={**found.parameters, **parameters}, name=name, idempotency_key=str(uuid4())
        )
        pool = found.work_pool_name or ""
        workers = client.read_workers_for_work_pool(pool) if pool else []
        online = sum(worker.status == WorkerStatus.ONLINE for worker in workers)
        return Submitted(run.id, run.name, page(f"runs/flow-run/{run.id}", url), pool, online)


def deployment_of(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    """The deployment of a flow; both have one name."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        raise ConfigError(
            f"the server has no deployment {name!r}", where=str(client.api_url), remedy="run make deploy"
        ) from None


def page(path: str, url: str) -> str:
    """The address of a page of the UI. url : of the API."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    own = settings.ui_url if settings.api.url == url else None
    base = (own or url.removesuffix("/api")).rstrip("/")
    below = _path_of_ui(url)
    return f"{base if base.endswith(below) else base + below}/{path}"


def _path_of_ui(url: str) -> str:
    """Where below its address the version of the UI lies that it opens with; "" if the server does not say.

    Prefect 3.8 has two versions, and an address without the path of the second one opens the first.
    """
    try:
        told = httpx.get(f"{url.removesuffix('/api')}/ui-settings", timeout=5).json()
        first, second = told["v1_base_url"].rstrip("/"), told["v2_base_url"].rstrip("/")
        return str(second.removeprefix(first)) if told["default_ui"] == "v2" else ""
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def watch(url: str, run: UUID, say: Callable[[str], None]) -> None:
    """Say what a run and its parts log of their work until it has ended; QRPOError unless it completed."""
    seen: Counter[UUID] = Counter()
    whole, patience = False, LOG_SECONDS
    with client_of(url) as client:
        while True:
            found = client.read_flow_run(run)
            whole |= _say_log(client, found, "", seen, say)
            for part in _parts(client, run):
                _say_log(client, part, _OURS, seen, say)
            if found.state is not None and found.state.is_final():
                if whole or patience <= 0 or not (found.state.is_completed() or found.state.is_failed()):
                    break
                patience -= POLL_SECONDS
            time.sleep(POLL_SECONDS)
    assert found.state is not None
    if not found.state.is_completed():
        raise QRPOError(
            f"{found.name}: {found.state.name}, {found.state.message or 'no message'}",
            where=page(f"runs/flow-run/{run}", url),
            remedy="committed results stay; mend the cause and submit it again",
        )


def _parts(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [str(run)]}})
    # Shards have a deployment; what they compute is in the log of the run that waits for them.
    return [each for each in client.read_flow_runs(flow_run_filter=wanted) if each.deployment_id is None]


def _say_log(
    client: SyncPrefectClient, run: FlowRun, logger: str, seen: Counter[UUID], say: Callable[[str], None]
) -> bool:
    """Say the new lines of a run's log.

    logger : of a part, how the names of its loggers that are heard begin; "" for the run itself.

    Returns whether Prefect's last line is among them. A run and its parts log in one process and in order, so
    that all of their lines are at the server when the run's last one is.
    """
    from prefect.client.schemas.filters import LogFilter

    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [str(run.id)]}})
    last = False
    while lines := client.read_logs(wanted, limit=200, offset=seen[run.id]):
        seen[run.id] += len(lines)
        last |= any(line.message.startswith(_LAST) for line in lines)
        for line in lines:
            heard = line.name.startswith(logger) and not (logger and line.level >= logging.WARNING)
            if heard and not line.message.startswith(_OF_PREFECT):
                say(line.message)
    return last
