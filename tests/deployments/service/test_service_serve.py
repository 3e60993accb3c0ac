"""`make serve` and its one variable for authentication, with real servers."""

from __future__ import annotations

import base64
import os
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.service import serve
from flows.service.serve import AUTH, DATABASE, RUN_ENVIRONMENT, SERVER_AUTH, SERVER_ENVIRONMENT, main, set_up
from flows.service.server import prefect_server
from qrpo_core.common.errors import ConfigError, QRPOError

PASSWORD = f"pass-{secrets.token_hex(12)}"


@pytest.fixture(scope="module")
def guarded(make_service: Callable[..., Any]) -> Any:
    """A server that was started with the one variable."""
    service = make_service(**{AUTH: f"operator:{PASSWORD}"})
    service.auth = ("operator", PASSWORD)
    service.serve()
    return service


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What main() sets in the environment is undone."""
    for name, value in SERVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in (AUTH, SERVER_AUTH):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.service
def test_without_the_password_nothing_is_answered(guarded: Any) -> None:
    token = guarded.ask("GET", "/csrf-token?client=test")["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
    for auth in (None, ("operator", "wrong"), ("operator", ""), ("", PASSWORD)):
        for method, path in (
            ("GET", "/admin/version"),
            ("POST", "/flow_runs/filter"),
            ("GET", "/csrf-token?client=test"),
        ):
            answer = httpx.request(method, f"{guarded.url}{path}", auth=auth, headers=headers, timeout=30)
            assert answer.status_code == 401, (auth, method, path)
        runs = guarded.url.removesuffix("/api") + "/qrpo/runs"
        assert httpx.get(runs, auth=auth, timeout=60).status_code == 401, auth
    assert httpx.get(f"{guarded.url}/admin/version", auth=guarded.auth, timeout=30).status_code == 200
    assert httpx.get(runs, auth=guarded.auth, timeout=60).status_code == 200


@pytest.mark.service
def test_a_change_without_a_csrf_token_is_refused(guarded: Any) -> None:
    made = {"name": "planted", "type": "process"}
    url, auth = f"{guarded.url}/work_pools/", guarded.auth
    for headers in ({}, {"Prefect-Csrf-Token": "guessed", "Prefect-Csrf-Client": "test"}):
        answer = httpx.post(url, json=made, auth=auth, headers=headers, timeout=30)
        assert (answer.status_code, "CSRF" in answer.text) == (403, True)
    assert guarded.ask("POST", "/work_pools/filter") == []  # with a token: 200, and nothing was made


@pytest.mark.service
def test_every_command_works_with_the_variable_and_says_so_without(
    guarded: Any, write_experiment: Callable[..., Path]
) -> None:
    assert "Work pool gpu created." in guarded.run("flows.service.deploy")
    workers = guarded.start("flows.service.workers")
    experiment = write_experiment()
    printed = guarded.run("flows.cli", "run", str(experiment), "--flow", "precompute")
    runs = guarded.ask("POST", "/flow_runs/filter")
    assert [(r["name"].partition(" · ")[0], r["state"]["type"]) for r in runs] == [
        ("precompute small", "COMPLETED")
    ]

    from qrpo_core.config.reading import load_experiment

    again = load_experiment(experiment).model_dump(mode="json")
    state = guarded.end(guarded.begin("precompute", again))
    assert state[0] == "COMPLETED", (state, guarded.log("flows.service.workers").read_text())
    assert workers.poll() is None

    refused = guarded.run("flows.cli", "run", str(experiment), status=2, **{AUTH: ""})
    assert f"{AUTH} is not set to what the Prefect server at {guarded.url} requires" in refused
    refused = guarded.run("flows.cli", "run", str(experiment), status=2, **{AUTH: "operator:wrong"})
    assert f"{AUTH} is not what the Prefect server at {guarded.url} requires" in refused
    assert "wrong" not in refused
    # The password is nowhere that another user of the machine, or of the UI, can look at.
    token = base64.b64encode(f"operator:{PASSWORD}".encode()).decode()
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    logs = [file.read_bytes() for file in guarded.folder.glob("*.log")]
    records = str(guarded.ask("POST", "/flow_runs/filter")) + str(guarded.ask("POST", "/logs/filter"))
    for text in (*commands, *logs, records.encode(), printed.encode()):
        assert PASSWORD.encode() not in text
        assert token.encode() not in text


@pytest.mark.service
def test_a_server_in_the_foreground_is_used_and_left_running(
    make_service: Callable[..., Any],
) -> None:
    from prefect.settings import temporary_settings

    service = make_service()
    service.serve()
    address = service.url.removesuffix("/api")
    assert service.log("flows.service.serve").read_text().splitlines() == [
        f"Prefect UI: {address}",
        f"For runs to use it: export PREFECT_API_URL={address}/api",
        f"Database: sqlite+aiosqlite:///{service.folder}/home/prefect.db",
        "Authentication: none: open to every user of this machine",
        f"Runs and reports: {address}/qrpo/runs, of QRPO_STORES=.qrpo",
    ]
    assert httpx.get(f"{address}/qrpo/runs", timeout=60).status_code == 200
    assert httpx.get(f"{address}/ui-settings", timeout=30).json()["api_url"] == service.url  # not port 4200
    with temporary_settings({"api.url": service.url}), prefect_server() as server:
        assert not server.own
        assert server.ui_url == address
    assert service.server.poll() is None
    os.killpg(service.server.pid, signal.SIGINT)
    assert service.server.wait(300) == 0
    assert "Traceback" not in service.log("flows.service.serve").read_text()


def test_a_server_of_a_runs_own_asks_for_what_the_run_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.service.server import _with_our_password

    monkeypatch.delenv(AUTH, raising=False)
    monkeypatch.setenv(SERVER_AUTH, "operator:of-the-service")
    assert SERVER_AUTH not in _with_our_password()
    monkeypatch.setenv(AUTH, "me:mine")
    assert _with_our_password()[SERVER_AUTH] == "me:mine"


def test_one_variable_switches_on_authentication_and_csrf() -> None:
    environment = {AUTH: "operator:secret"}
    set_up(environment)
    assert environment[SERVER_AUTH] == "operator:secret"
    assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    environment = {SERVER_AUTH: "operator:secret"}
    set_up(environment)
    assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    environment = {}
    set_up(environment)
    assert environment == {**SERVER_ENVIRONMENT, "PREFECT_UI_URL": "http://127.0.0.1:4200"}
    environment = {"PREFECT_SERVER_API_HOST": "10.0.0.1"}
    set_up(environment)
    assert "PREFECT_UI_URL" not in environment  # nothing that a browser elsewhere could not open


@pytest.mark.parametrize("name", [AUTH, SERVER_AUTH])
def test_what_is_no_user_and_password_is_refused_and_not_shown(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"not of the form user:password \[{name}\]") as told:
        set_up({name: "hunter2"})
    assert "hunter2" not in str(told.value)


@pytest.mark.usefixtures("defaults")
def test_serving_refuses_to_be_reached_by_everybody() -> None:
    from prefect.settings import temporary_settings

    with (
        temporary_settings({"server.api.host": "0.0.0.0", "server.api.auth_string": None}),
        pytest.raises(ConfigError, match=rf"set {AUTH}=user:password"),
    ):
        main()


@pytest.mark.usefixtures("defaults")
def test_serving_on_a_port_that_is_taken() -> None:
    from prefect.settings import temporary_settings

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        temporary_settings({"server.api.host": "127.0.0.1", "server.api.port": taken.getsockname()[1]}),
        pytest.raises(QRPOError, match=r"cannot listen.*PREFECT_SERVER_API_PORT"),
    ):
        main()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql+asyncpg://u:hunter2@db.example/qrpo", "postgresql+asyncpg://u:***@db.example/qrpo"),
        ("postgresql://u:hunter2@db.example/qrpo", None),
        ("u:hunter2", None),
    ],
)
def test_the_database_is_named_without_its_password(url: str, told: str | None) -> None:
    from prefect.settings import temporary_settings

    with temporary_settings({"server.database.connection_url": url}):
        if told is not None:
            assert serve.database() == told
            return
        with pytest.raises(ConfigError, match=rf"\[{DATABASE}\]: write postgresql\+asyncpg://") as refused:
            serve.database()
    assert "hunter2" not in str(refused.value)


def test_every_setting_of_a_run_is_one_that_prefect_knows() -> None:
    from prefect.settings import get_current_settings

    known = get_current_settings().to_environment_variables(include_aliases=True)
    assert set(RUN_ENVIRONMENT) <= set(known)
