"""`qrpo run`: check everything cheap, find or start a server, run a flow, print the result."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rich.console import Console

from flows.server import PrefectServer, prefect_server, quiet_console
from flows.told import told
from qrpo_core.config import Experiment
from qrpo_core.preflight import check
from qrpo_core.steps.workspace import Workspace


def run(experiment: Experiment, name: str) -> int:
    """Run the flow `name` for an experiment; returns the exit status. Raises QRPOError for bad input."""
    check(Workspace(experiment), told("checked", "prompts"))
    # The server and the model share the cores: threads that spin while they wait would starve both.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_console()
    server = PrefectServer().start()
    flow = _flow(name)  # imports Prefect while the server boots
    console = Console(stderr=True)
    from tasks.progress import use_console
    from tasks.stages import passed

    use_console(console)
    passed(experiment)
    with prefect_server(server) as server:
        console.print(
            f"{name} {experiment.name}, store {experiment.store.path}, UI {server.ui_url}", highlight=False
        )
        flow(experiment)
    if name in ("align", "evaluate"):
        from qrpo_core.show import result_lines

        print("\n" + "\n".join(result_lines(Workspace(experiment))))
    return 0


def _flow(name: str) -> Callable[[Experiment], Any]:
    from flows.align import align
    from flows.evaluate import evaluate
    from flows.precompute import precompute
    from flows.top_up import top_up
    from flows.train import train

    flows: dict[str, Callable[[Experiment], Any]] = {
        "align": align,
        "precompute": precompute,
        "train": train,
        "evaluate": evaluate,
        "top_up": top_up,
    }
    return flows[name]
