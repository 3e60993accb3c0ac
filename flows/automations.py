"""What the server of a service does by itself, as code: put there by `make deploy`, as often as you like.

- A run of ours from which no heartbeat came for QRPO_CRASHED_AFTER seconds (90 if unset) is marked Crashed:
  its machine, or its process with all that watched it, is gone. That frees its place in its work pool.
- Where QRPO_NOTIFY_URL is set at `make deploy`, the server sends a POST there for every run of a deployment
  that fails or crashes: JSON with `text` (what chats show), `run`, `deployment`, `state`, `message`, `url`.
  Where it is not, that automation is taken away again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from flows.server import HEARTBEAT
from qrpo_core.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

#: The tag of all deployments of deployments/prefect.yaml.
TAG = "qrpo"
CRASHED_AFTER, NOTIFY_URL = "QRPO_CRASHED_AFTER", "QRPO_NOTIFY_URL"
SILENT, FAILED = "qrpo: no heartbeat", "qrpo: failed runs"

_BEAT = "prefect.flow-run.heartbeat"
_ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")}
_BLOCK = "qrpo-failed-runs"
# Rendered by the server with Jinja.
_PAYLOAD = """{
  "text": {{ ("Run " ~ flow_run.name ~ " of " ~ deployment.name ~ ": " ~ flow_run.state.name ~ ". "
              ~ (flow_run.state.message or "") ~ " " ~ (flow_run | ui_url or "")) | tojson }},
  "run": {{ flow_run.name | tojson }},
  "deployment": {{ deployment.name | tojson }},
  "state": {{ flow_run.state.name | tojson }},
  "message": {{ (flow_run.state.message or "") | tojson }},
  "url": {{ (flow_run | ui_url or "") | tojson }}
}"""


def put_automations(url: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Bring the automations of the server at a URL of its API up to date; a line for each.

    The deployments are there already. Raises ConfigError for a variable that is refused.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import temporary_settings

    seconds, hook = crashed_after(environment), environment.get(NOTIFY_URL)
    if hook and not hook.startswith(("http://", "https://")):  # it may carry a secret: it is not shown
        raise ConfigError("it is not an http(s) URL", where=NOTIFY_URL, remedy="set it to one, or unset it")
    updates: dict[Any, Any] = {"api.url": url}
    with temporary_settings(updates=updates), get_client(sync_client=True) as client:
        deployments = [d for d in _every(client, "/deployments/filter") if TAG in d["tags"]]
        flows = sorted({f"prefect.flow.{d['flow_id']}" for d in deployments})
        _put(client, _silent(flows, seconds))
        lines = [f"Automation {SILENT!r}: Crashed after {seconds} s without one."]
        if hook:
            ids = sorted(f"prefect.deployment.{d['id']}" for d in deployments)
            _put(client, _failed(ids, _webhook(hook)))
            lines.append(f"Automation {FAILED!r}: a POST to the address in {NOTIFY_URL}.")
        elif _remove(client, FAILED):
            lines.append(f"Automation {FAILED!r} removed: {NOTIFY_URL} is not set.")
    return lines


async def give_time() -> None:
    """In a server that starts: from now on, runs have as long as ever to send their next heartbeat.

    While it was away they sent them to nobody, and it would take those that live for dead.
    """
    from prefect.server.database import provide_database_interface
    from sqlalchemy import select, update

    db = provide_database_interface()
    await db.create_db()  # or migrate it
    async with db.session_context(begin_transaction=True) as session:
        silent = await session.execute(select(db.Automation).where(db.Automation.name == SILENT))
        for automation in silent.scalars():
            waiting = db.AutomationBucket
            end = datetime.now(UTC) + automation.trigger.within
            early = (waiting.automation_id == automation.id, waiting.end < end)
            await session.execute(update(waiting).where(*early).values(end=end))


def crashed_after(environment: Mapping[str, str]) -> int:
    """Seconds without a heartbeat after which a run is dead; ConfigError unless longer than one beat."""
    text = environment.get(CRASHED_AFTER, "90")
    if not (text.isdecimal() and int(text) > HEARTBEAT):
        raise ConfigError(
            f"{text!r} is not a number of seconds above {HEARTBEAT}",
            where=CRASHED_AFTER,
            remedy=f"runs send a heartbeat every {HEARTBEAT} s: allow for two that are late, or unset it",
        )
    return int(text)


def _silent(flows: list[str], seconds: int) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    # By flow and not by deployment: the runs inside a run have none, and end with it. And not every flow of
    # the server: another project's runs may send a heartbeat every three minutes, Prefect's default.
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.id": flows},
        for_each={"prefect.resource.id"},
        after={_BEAT},
        expect={_BEAT, *_ENDS},
        within=timedelta(seconds=seconds),
    )
    message = f"No heartbeat for {seconds} s: its process is gone. What it committed stays; run it again."
    return AutomationCore(
        name=SILENT,
        description="A run whose process or machine is gone; from flows/automations.py by `make deploy`.",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def _failed(deployments: list[str], block: Any) -> AutomationCore:
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    trigger = EventTrigger(
        posture=Posture.Reactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "deployment", "prefect.resource.id": deployments},
        for_each={"prefect.resource.id"},
        expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
    )
    return AutomationCore(
        name=FAILED,
        description=f"Tells {NOTIFY_URL} of a failed run; from flows/automations.py by `make deploy`.",
        trigger=trigger,
        actions=[CallWebhook(block_document_id=block, payload=_PAYLOAD)],
    )


def _webhook(url: str) -> Any:
    """The id of the block that holds the address, which the server keeps encrypted and shows masked."""
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    return Webhook(url=SecretStr(url)).save(_BLOCK, overwrite=True)


def _put(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Make it, or bring the one of its name up to date."""
    found = _named(client, wanted.name)
    if not found:
        client.create_automation(wanted)
        return
    first, *others = found
    # One that is as wanted is left alone: a change makes it forget which runs it is waiting for.
    if type(wanted).model_validate({name: first.get(name) for name in wanted.model_dump()}) != wanted:
        body = wanted.model_dump(mode="json", exclude={"owner_resource"})
        client.request("PUT", f"/automations/{first['id']}", json=body)
    for other in others:  # two `make deploy` at once
        client.request("DELETE", f"/automations/{other['id']}")


def _remove(client: SyncPrefectClient, name: str) -> int:
    """How many there were."""
    found = _named(client, name)
    for automation in found:
        client.request("DELETE", f"/automations/{automation['id']}")
    return len(found)


def _named(client: SyncPrefectClient, name: str) -> list[dict[str, Any]]:
    asked = {"automations": {"name": {"any_": [name]}}}
    found: list[dict[str, Any]] = client.request("POST", "/automations/filter", json=asked).json()
    return found


def _every(client: SyncPrefectClient, path: str) -> list[dict[str, Any]]:
    """All there is, page by page."""
    found: list[dict[str, Any]] = []
    while page := client.request("POST", path, json={"offset": len(found), "limit": 200}).json():
        found += page
    return found
