"""The automations that `make deploy` puts on a real server, and the POST that one of them sends."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any
from uuid import uuid4

import httpx
import pytest

from flows.service.automations import (
    CRASHED_AFTER,
    FAILED,
    NOTIFY_URL,
    SILENT,
    crashed_after,
    put_automations,
)
from flows.service.server import HEARTBEAT
from qrpo_core.common.errors import ConfigError

TOKEN = secrets.token_hex(12)
REASON = 'a "quoted" reason,\nin two lines \\ with {{ braces }}'


@pytest.fixture(scope="module")
def hook() -> Iterator[tuple[str, Queue[Any]]]:
    """URL of a real HTTP server, and what was posted there."""
    posted: Queue[Any] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            posted.put((self.path, body))

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook/{TOKEN}", posted
        server.shutdown()


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Any]) -> Any:
    service = make_service()
    service.serve()
    return service


def standing(service: Any) -> dict[str, str]:
    """The automations that are not triggers of a deployment, by name: their ids."""
    found = service.ask("POST", "/automations/filter")
    names = {automation["name"]: automation["id"] for automation in found}
    assert len(names) == len(found)  # none doubled
    return {name: id for name, id in names.items() if name.startswith("qrpo: ")}


def read(service: Any, name: str) -> Any:
    (found,) = service.ask("POST", "/automations/filter", automations={"name": {"any_": [name]}})
    return found


@pytest.mark.service
def test_deploying_puts_them_there_once(service: Any, hook: tuple[str, Queue[Any]]) -> None:
    url, posted = hook
    assert f"Automation '{SILENT}': Crashed after 90 s without one." in service.run("flows.service.deploy")
    first = standing(service)
    assert set(first) == {SILENT}
    was = read(service, SILENT)
    service.run("flows.service.deploy")
    assert read(service, SILENT) == was  # not touched: it would forget the runs that it waits for
    # From here on without putting up the deployments again, which takes its time.
    printed = put_automations(service.url, {NOTIFY_URL: url})
    assert f"Automation '{FAILED}': a POST to the address in {NOTIFY_URL}." in printed
    second = standing(service)
    assert (set(second), second[SILENT]) == ({SILENT, FAILED}, first[SILENT])
    put_automations(service.url, {NOTIFY_URL: url, CRASHED_AFTER: "120"})
    assert standing(service) == second
    assert read(service, SILENT)["trigger"]["within"] == 120

    # A run that fails is told, whatever its message; one that completes is not.
    deployment = service.ask("GET", "/deployments/name/precompute/precompute")
    path = f"/deployments/{deployment['id']}/create_flow_run"
    runs = {}
    for state in ("COMPLETED", "FAILED"):
        runs[state] = service.ask("POST", path, parameters=deployment["parameters"], name=f"run-{state}")
        wanted = {"type": state, "name": state.capitalize(), "message": REASON}
        service.ask("POST", f"/flow_runs/{runs[state]['id']}/set_state", state=wanted, force=True)
    at, body = posted.get(timeout=300)
    assert at == f"/hook/{TOKEN}"
    address = f"{service.url.removesuffix('/api')}/runs/flow-run/{runs['FAILED']['id']}"
    assert json.loads(body) == {
        "text": f"Run run-FAILED of precompute: Failed. {REASON} {address}",
        "run": "run-FAILED",
        "deployment": "precompute",
        "state": "Failed",
        "message": REASON,
        "url": address,
    }
    with pytest.raises(Empty):
        posted.get(timeout=3)
    # The address may carry a secret: it is masked, and not in the log.
    blocks = service.ask("POST", "/block_documents/filter")
    assert [TOKEN in str(block) for block in blocks] == [False] * len(blocks)
    assert TOKEN not in service.log("flows.service.serve").read_text()

    printed = put_automations(service.url, {})
    assert read(service, SILENT)["trigger"]["within"] == 90
    assert f"Automation '{FAILED}' removed: {NOTIFY_URL} is not set." in printed
    assert standing(service) == first


@pytest.mark.service
def test_they_are_about_our_runs_alone(service: Any) -> None:
    """Another project's flows on the same server may send heartbeats less often."""
    automation = read(service, SILENT)
    named = automation["trigger"]["match_related"]["prefect.resource.id"]
    flows = {f"prefect.flow.{flow['id']}": flow["name"] for flow in service.ask("POST", "/flows/filter")}
    assert {"align", "precompute", "train", "evaluate"} <= {flows[name] for name in named}
    assert service.ask("POST", "/flows/", name="somebody's")
    put_automations(service.url, {})
    automation = read(service, SILENT)
    assert automation["trigger"]["match_related"]["prefect.resource.id"] == named


@pytest.mark.service
def test_a_server_that_was_away_waits_again(service: Any) -> None:
    """What runs sent meanwhile was heard by nobody: it must not take them for dead when it is back."""
    put_automations(service.url, {CRASHED_AFTER: "31"})
    deployment = service.ask("GET", "/deployments/name/precompute/precompute")
    path = f"/deployments/{deployment['id']}/create_flow_run"
    run = service.ask("POST", path, parameters=deployment["parameters"])["id"]
    service.ask(
        "POST", f"/flow_runs/{run}/set_state", state={"type": "RUNNING", "name": "Running"}, force=True
    )
    now = datetime.now(UTC).isoformat()
    flow = {
        "prefect.resource.id": f"prefect.flow.{deployment['flow_id']}",
        "prefect.resource.role": "flow",
    }
    beat = {
        "occurred": now,
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [flow],
        "id": str(uuid4()),
    }
    answer = httpx.post(f"{service.url}/events", json=[beat], timeout=30)
    assert answer.is_success, answer.text
    time.sleep(8)  # it is heard
    service.server.kill()
    service.server.wait()
    time.sleep(25)
    service.serve()
    back = time.monotonic()
    while time.monotonic() < back + 20:  # it looks every 5 s
        assert service.state(run)[0] == "RUNNING"
        time.sleep(0.5)
    assert service.end(run, 300)[0] == "CRASHED"
    assert time.monotonic() > back + 25


@pytest.mark.parametrize("text", [str(HEARTBEAT), "-1", "soon", ""])
def test_a_time_shorter_than_a_heartbeat_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"'{text}' is not a number of seconds above 30 \[{CRASHED_AFTER}\]"
    ):
        crashed_after({CRASHED_AFTER: text})
    assert crashed_after({CRASHED_AFTER: "31"}) == 31
    assert crashed_after({}) == 90


def test_an_address_that_is_none_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match=rf"not an http\(s\) URL \[{NOTIFY_URL}\]") as told:
        put_automations("http://127.0.0.1:9/api", {NOTIFY_URL: "hooks.example/hunter2"})
    assert "hunter2" not in str(told.value)
