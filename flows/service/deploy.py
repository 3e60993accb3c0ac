"""`make deploy`: put deployments/prefect.yaml on a server. Also the pull step of that file.

`make deploy NAME=x STORE=PATH` adds deployments `align-x`, …, whose forms begin with that store, beside those
that are there. They are for people: runs that other runs start have their store in their parameters.

Every run of a deployment calls `enter_checkout`, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.service.automations import put_automations
from flows.service.schedules import kept_schedules, restore_schedules
from flows.service.server import server_error
from flows.service.submissions import DEPLOYMENTS, client_of
from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.common.extras import require

ROOT = Path(__file__).resolve().parents[2]
PREFECT_FILE = "deployments/prefect.yaml"

#: The work pools, all of type process, with their descriptions in the UI.
POOLS: dict[str, str] = {
    "cpu": "Runs that load no model, or wait for others that do. Any number at a time.",
    "gpu": "Runs that sample from a model or train one. One at a time for each worker.",
}


def enter_checkout() -> dict[str, str]:
    """Pull step: change to the checkout that this environment imports the project from; {"directory": it}.

    A worker's run starts in an empty folder. Relative paths of an experiment (store, prompts, model) start at
    the repository's root, as they do in `qrpo run` there.
    """
    os.chdir(ROOT)
    return {"directory": str(ROOT)}


def service_url() -> str:
    """API URL of the configured server, else that of `make serve`; QRPOError if it does not answer."""
    require("prefect", "a service")
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.api.url or f"http://{settings.server.api.host}:{settings.server.api.port}/api"
    if (error := server_error(url)) is not None:
        remedy = "start it (make serve), or set PREFECT_API_URL to the one in use"
        raise QRPOError(f"no Prefect server answers at {url} ({error!r})", remedy=remedy)
    return url


def create_pools(url: str) -> list[str]:
    """Create the missing work pools; returns their names. QRPOError if one exists with another type."""
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
                        "rename or delete that pool, or change deployments/prefect.yaml and flows/service"
                    )
                    raise QRPOError(
                        f"work pool {name!r} has type {kind!r}", where=url, remedy=remedy
                    ) from None
    return created


def main(arguments: Sequence[str] = ()) -> int:
    """Create missing pools, update every deployment and automation; returns the exit status. Repeatable.

    arguments : none, or a name and a store, whose deployments are added or updated and no others.
    """
    file = for_a_store(*arguments) if arguments else (ROOT / PREFECT_FILE).read_text(encoding="utf-8")
    url = service_url()
    for name in create_pools(url):
        print(f"Work pool {name} created.", flush=True)
    with client_of(url) as client:
        kept = {} if arguments else kept_schedules(client, DEPLOYMENTS)
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "prefect.yaml").write_text(file, encoding="utf-8")
            command = ["--no-prompt", "deploy", "--prefect-file", f"{scratch}/prefect.yaml", "--all"]
            environment = {**os.environ, "PREFECT_API_URL": url}
            done = subprocess.run([sys.executable, "-m", "prefect", *command], cwd=ROOT, env=environment)
        restore_schedules(client, kept)
    if done.returncode == 0:
        print("\n".join(put_automations(url)))
        print("Runs need workers: make workers, here or on other machines.", flush=True)
    return done.returncode


def for_a_store(name: str = "", store: str = "", *more: str) -> str:
    """The text of deployments/prefect.yaml with the deployments of people alone, for one store.

    name : what their names end with. Raises ConfigError.
    """
    if more or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", name) or not store:
        asked = " ".join((name, store, *more)).strip()
        remedy = "make deploy NAME=team STORE=s3://bucket/prefix; NAME has letters, digits and . _ -"
        raise ConfigError(f"not a name and a store: {asked!r}", where="make deploy", remedy=remedy)
    from qrpo_core.config import StoreConfig
    from qrpo_core.store.backends.opening import open_objects

    place = open_objects(StoreConfig(path=store)).url
    file = yaml.safe_load((ROOT / PREFECT_FILE).read_text(encoding="utf-8"))
    own = [each for each in file["deployments"] if each["name"] in DEPLOYMENTS]
    for each in own:
        each |= {"name": f"{each['name']}-{name}", "tags": [*each["tags"], name]}
        each["description"] = f"Store: {place}. {each['description']}"
        each["parameters"]["experiment"] = {**each["parameters"]["experiment"], "store": place}
        each.pop("triggers", None)  # those of `train` and `evaluate` start a run for any store
    return str(yaml.safe_dump({**file, "deployments": own}))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except QRPOError as error:
        sys.exit(f"error: {error}")
