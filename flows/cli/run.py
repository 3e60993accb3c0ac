"""`qrpo run`: run the cheap checks, find or start a server, run a flow, print the result."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from flows.cli.progress_line import progress_line
from flows.service.server import PrefectServer, prefect_server, quiet_console
from qrpo_core.common.errors import ConfigError
from qrpo_core.common.extras import require
from qrpo_core.config import Experiment
from qrpo_core.config.experiment import ServiceConfig
from qrpo_core.config.reading import parse_section
from qrpo_core.inspection.memory import check_memory
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.workspace import Workspace
from tasks.page_links import STORES

#: Flows whose missing rows a work pool can compute.
POOLED_FLOWS = ("align", "precompute", "train", "evaluate")


def run(experiment: Experiment, name: str, pool: str | None = None, cap: float | None = None) -> int:
    """Run the flow `name` for an experiment; returns the exit status. Raises QRPOError for bad input.

    pool : work pool whose workers compute the missing rows; None for this process.
    cap : GPU hours after which the run stops; None for service.max_gpu_hours.
    """
    if cap is not None:
        service = parse_section(ServiceConfig, {**dict(experiment.service), "max_gpu_hours": cap}, "qrpo run")
        experiment = experiment.model_copy(update={"service": service})
    if pool is not None and name not in POOLED_FLOWS:
        raise ConfigError(
            f"the flow {name} computes no rows on a work pool",
            where=f"--pool {pool}",
            remedy=f"leave --pool out, or run --flow {' or '.join(POOLED_FLOWS)}",
        )
    workspace = Workspace(experiment)
    require_extras("qrpo run")
    check(workspace, progress_line("checked", "prompts"))
    check_memory(workspace, name, pooled=pool is not None)
    given = {} if pool is None else {"pool": pool}
    run_flow(experiment, name, lambda flow: flow(experiment, **given))
    if name in ("align", "evaluate"):
        from qrpo_core.inspection.result import result_lines

        print("\n" + "\n".join(result_lines(Workspace(experiment))))
    return 0


def require_extras(command: str) -> None:
    """Raise ConfigError without the packages of a run."""
    for package in ("prefect", "matplotlib"):
        require(package, command)


def run_flow(experiment: Experiment, name: str, call: Callable[[Callable[..., Any]], Any]) -> Any:
    """The result of `call`, which runs the flow `name` on a server that is found or started.

    experiment : has passed preflight, as it is.
    """
    # The server and the model run on the same cores, and OpenMP threads that spin while waiting slow both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(STORES, experiment.store.path)  # a server of its own shows the run's report
    quiet_console()
    server = PrefectServer().start()
    flow: Callable[..., Any] = getattr(importlib.import_module(f"flows.{name}"), name)  # the server boots
    from rich.console import Console

    console = Console(stderr=True)
    from tasks.progress import use_console
    from tasks.stages import skip_preflight

    use_console(console)
    skip_preflight(experiment)
    with prefect_server(server) as server:
        console.print(
            f"{name} {experiment.name}, store {experiment.store.path}, UI {server.ui_url}",
            highlight=False,
            markup=False,
        )
        return call(flow)
