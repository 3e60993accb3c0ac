"""`make deploy`: put deployments/prefect.yaml on a server; and the steps that file names.

Nothing heavy is imported at the top: every run of a deployment passes through `enter_checkout`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.automations import put_automations
from flows.server import ask
from qrpo_core.errors import QRPOError

ROOT = Path(__file__).resolve().parents[1]
PREFECT_FILE = "deployments/prefect.yaml"

#: The work pools, all of type process, and what the UI says of them.
POOLS: dict[str, str] = {
    "cpu": "Runs that load no model, or wait for others that do; any number at a time.",
    "gpu": "Runs that sample from a model or train one; a worker takes one at a time.",
}


def form_defaults(file: str) -> dict[str, Any]:
    """Build step: the experiment of a file with every default filled in, as JSON values.

    `file` is relative to the repository's root. The output has one key, `experiment`. Raises ConfigError.
    """
    from qrpo_core.experiments import load_experiment

    return {"experiment": load_experiment(ROOT / file).model_dump(mode="json")}


def enter_checkout() -> dict[str, str]:
    """Pull step: work in the checkout that this environment has the project from; output `directory`.

    A worker's run starts in an empty folder, and relative paths of an experiment (store, prompts, model) are
    meant as `qrpo run` takes them in the repository's root.
    """
    os.chdir(ROOT)
    return {"directory": str(ROOT)}


def service_url() -> str:
    """The API of the server that is configured, or else of `make serve`; raises QRPOError if none answers."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.api.url or f"http://{settings.server.api.host}:{settings.server.api.port}/api"
    if (error := ask(url)) is not None:
        remedy = "start it (make serve), or set PREFECT_API_URL to the one in use"
        raise QRPOError(f"no Prefect server answers at {url} ({error!r})", remedy=remedy)
    return url


def create_pools(url: str) -> list[str]:
    """Create the work pools that are not there, leave alone those that are; returns the names of the new.

    Raises QRPOError if one is there with another type than process.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import temporary_settings
    from prefect.workers.process import ProcessWorker

    created = []
    updates: dict[Any, Any] = {"api.url": url}
    with temporary_settings(updates=updates), get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            template = ProcessWorker.get_default_base_job_template()
            wanted = WorkPoolCreate(
                name=name, description=description, type="process", base_job_template=template
            )
            try:
                client.create_work_pool(wanted)
                created.append(name)
            except ObjectAlreadyExists:
                if (kind := client.read_work_pool(name).type) != "process":
                    remedy = (
                        "rename or delete that pool, or change deployments/prefect.yaml and flows/deploy.py"
                    )
                    raise QRPOError(
                        f"work pool {name!r} has type {kind!r}", where=url, remedy=remedy
                    ) from None
    return created


def main() -> int:
    """Create what is missing and bring every deployment up to date; run it as often as you like."""
    url = service_url()
    for name in create_pools(url):
        print(f"Work pool {name} created.", flush=True)
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--prefect-file",
        PREFECT_FILE,
        "--all",
    ]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PREFECT_API_URL": url}).returncode
    if status == 0:
        print("\n".join(put_automations(url)), flush=True)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QRPOError as error:
        sys.exit(f"error: {error}")
