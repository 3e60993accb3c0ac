"""The automations of a service's server, which `make deploy` creates or updates.

- A run that sends no heartbeat for QRPO_CRASHED_AFTER seconds (default 90) is marked Crashed: its machine or
  process is gone. That frees its slot in the work pool. Prefect sends heartbeats, and leaves this to an
  automation.
- Where QRPO_NOTIFY_URL is set at `make deploy`, the server sends a POST there for every run of a deployment
  that fails or crashes: JSON with `text` (for chats), `run`, `deployment`, `state`, `message`, `url`. Where
  it is not set, that automation is removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from flows.service.server import HEARTBEAT
from qrpo_core.common.errors import ConfigError

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
    """Create or update the automations of the server at this API URL; returns a line for each.

    The deployments must exist. Raises ConfigError for a bad variable.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import temporary_settings

    seconds, hook = crashed_after(environment), environment.get(NOTIFY_URL)
    if hook and not hook.startswith(("http://", "https://")):  # it may contain a secret and is not shown
        raise ConfigError("it is not an http(s) URL", where=NOTIFY_URL, remedy="set it to one, or unset it")
    updates: dict[Any, Any] = {"api.url": url}
    with temporary_settings(updates=updates), get_client(sync_client=True) as client:
        deployments = [d for d in _read_all(client, "/deployments/filter") if TAG in d["tags"]]
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


async def restart_heartbeat_deadlines() -> None:
    """Called when a server starts: give every run the full time again to send its next heartbeat.

    Heartbeats sent while the server was down are lost; without this it would mark living runs Crashed.
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
    """Seconds without a heartbeat after which a run is Crashed; ConfigError unless above one interval."""
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

    # Matched by flow, since subflow runs have no deployment and must end too. Only our flows: another
    # project's runs may send a heartbeat every three minutes, Prefect's default.
    trigger = EventTrigger(
        posture=Posture.Proactive,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.id": flows},
        for_each={"prefect.resource.id"},
        after={_BEAT},
        expect={_BEAT, *_ENDS},
        within=timedelta(seconds=seconds),
    )
    message = f"No heartbeat for {seconds} s: the process is gone. Committed results stay; run it again."
    return AutomationCore(
        name=SILENT,
        description="Marks a run Crashed whose process or machine is gone. Made by `make deploy`.",
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
        description=f"Reports a failed run to {NOTIFY_URL}. Made by `make deploy`.",
        trigger=trigger,
        actions=[CallWebhook(block_document_id=block, payload=_PAYLOAD)],
    )


def _webhook(url: str) -> Any:
    """The id of the block with the address, which the server encrypts at rest and masks in the UI."""
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    return Webhook(url=SecretStr(url)).save(_BLOCK, overwrite=True)


def _put(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create an automation, or update the one of its name."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return
    first, *duplicates = found
    # Updated only if it differs: an update makes the server forget the runs that it watches.
    if type(wanted).model_validate(first.model_dump(include=set(type(wanted).model_fields))) != wanted:
        # update_automation() leaves out defaults, among them the types of the actions.
        body = wanted.model_dump(mode="json", exclude={"owner_resource"})
        client.request("PUT", f"/automations/{first.id}", json=body)
    for duplicate in duplicates:  # two `make deploy` at once
        client.delete_automation(duplicate.id)


def _remove(client: SyncPrefectClient, name: str) -> int:
    """Delete the automations of a name; returns how many there were."""
    found = client.read_automations_by_name(name)
    for automation in found:
        client.delete_automation(automation.id)
    return len(found)


def _read_all(client: SyncPrefectClient, path: str) -> list[dict[str, Any]]:
    """All results of a filter, page by page."""
    found: list[dict[str, Any]] = []
    while page := client.request("POST", path, json={"offset": len(found), "limit": 200}).json():
        found += page
    return found
