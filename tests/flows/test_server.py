"""The run's Prefect server: real servers, and runs in processes of their own, as `qrpo run` is one."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service import server as module
from flows.service.server import PrefectServer, prefect_server, quiet_console
from qrpo_core.common.errors import QRPOError

ROOT = Path(module.__file__).parents[2]

# Three subflows of two tasks. Says what the tests want to know as JSON lines.
RUN = """
import json, os, sys
from flows.service.server import PrefectServer, prefect_server, quiet_console

def say(**facts):
    print(json.dumps(facts), flush=True)

quiet_console()
server = PrefectServer().start()
say(pid=server._process.pid, url=server.url, light="prefect" not in sys.modules)

import time, urllib.request
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from qrpo_core.common.errors import ConfigError

@task(cache_policy=NO_CACHE)
def part(number):
    say(part=number)
    time.sleep(float(os.environ.get("SECONDS_A_PART", 0)))
    return number

@flow
def some(number):
    return [part(2 * number), part.submit(2 * number + 1).result()]

@flow
def everything():
    return [some(number) for number in range(3)]

@task(cache_policy=NO_CACHE)
def refuse():
    raise ConfigError("no", where="here")

@flow
def refused():
    refuse()

with prefect_server(server):
    with urllib.request.urlopen(server.ui_url + "/ui-settings") as answer:
        say(ui_asks=json.load(answer)["api_url"])
    say(result=everything(), url_of_children=os.environ["PREFECT_API_URL"])
    try:
        refused()
    except ConfigError as error:
        say(raised=str(error))
say(url_afterwards=os.environ.get("PREFECT_API_URL"))
"""


# A server that is away when a task asks for it.
AWAY = """
import json
from flows.service.server import PrefectServer, prefect_server, quiet_console

quiet_console()
server = PrefectServer().start()
from prefect import flow, task
from qrpo_core.common.errors import QRPOError

@task
def part():
    pass

@flow
def cut_off():
    server.stop()
    part()

try:
    with prefect_server(server, flush_seconds=0):
        cut_off()
except QRPOError as error:
    print(json.dumps({"url": server.url, "raised": str(error)}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PREFECT_HOME for the module; the first server makes its database."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def begin(home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script as a run; whatever it leaves is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**inherited, "PREFECT_HOME": str(home), **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], wanted: str) -> Any:
    """Read a run's lines until one has the wanted fact."""
    assert process.stdout is not None
    for line in process.stdout:
        facts = json.loads(line)
        if wanted in facts:
            return facts
    raise AssertionError(f"ended without {wanted!r}: {process.stderr.read() if process.stderr else ''}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent died waits for init, which in a container may not collect it.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until_gone(pid: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def recorded(home: Path, table: str) -> Counter[str]:
    """How many runs the database has, by state."""
    database = sqlite3.connect(home / "prefect.db")
    try:
        return Counter(dict(database.execute(f"select state_type, count(*) from {table} group by 1")))
    finally:
        database.close()


@pytest.mark.slow
@pytest.mark.long
def test_two_runs_at_once_each_have_a_server_and_record_everything(
    begin: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    assert not (home / "prefect.db").exists()  # both migrate: one after the other
    runs = [begin(RUN), begin(RUN)]
    facts = [hear(run, "pid") for run in runs]
    assert facts[0]["url"] != facts[1]["url"]
    for run, fact in zip(runs, facts, strict=True):
        out, err = run.communicate(timeout=900)
        said = {k: v for line in out.splitlines() for k, v in json.loads(line).items()}
        assert run.returncode == 0, err
        # The console is quiet: what the flow raises is for its caller to tell. A server on a busy machine may
        # keep the client waiting at the end, which says so.
        assert [line for line in err.splitlines() if "Still processing items" not in line] == []
        assert said["raised"] == "no [here]"
        assert said["result"] == [[0, 1], [2, 3], [4, 5]]
        assert fact["light"]  # the server boots before Prefect is imported
        assert said["ui_asks"] == fact["url"]  # not port 4200
        assert said["url_of_children"] == fact["url"]
        assert said["url_afterwards"] is None
        assert not alive(fact["pid"])
    # A subflow is a task run of its parent.
    assert recorded(home, "task_run") == {"COMPLETED": 2 * (6 + 3), "FAILED": 2}
    assert recorded(home, "flow_run") == {"COMPLETED": 2 * 4, "FAILED": 2}


@pytest.mark.slow
def test_a_server_that_fails_in_the_middle_of_a_run_is_one_line(
    begin: Callable[..., subprocess.Popen[str]],
) -> None:
    run = begin(AWAY, PREFECT_CLIENT_MAX_RETRIES="0")
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    said = json.loads(out)
    assert said["raised"].startswith(f"the Prefect server at {said['url']} failed (ConnectError(")
    assert "run again (committed results stay)" in said["raised"]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_reaches_the_run_alone_which_still_records_how_it_ended(
    begin: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    before = recorded(home, "flow_run")
    run = begin(RUN, SECONDS_A_PART="60")
    pid = hear(run, "pid")["pid"]
    hear(run, "part")
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0
    assert "KeyboardInterrupt" in err
    assert "| ERROR" not in err  # the one who called the flow tells it
    assert not alive(pid)
    assert recorded(home, "flow_run") - before == {"CRASHED": 2}
    assert recorded(home, "task_run")["RUNNING"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_server_dies_with_a_run_that_is_killed(begin: Callable[..., subprocess.Popen[str]]) -> None:
    early, late = begin(RUN), begin(RUN, SECONDS_A_PART="60")
    booting = hear(early, "pid")["pid"]
    early.kill()
    wait_until_gone(booting)
    pid = hear(late, "pid")["pid"]
    hear(late, "part")
    late.kill()
    wait_until_gone(pid)


def test_a_configured_server_that_does_not_answer() -> None:
    from prefect.settings import temporary_settings

    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    with (
        temporary_settings({"api.url": url}),
        pytest.raises(QRPOError, match=rf"no Prefect server answers at {url}.*make serve"),
        prefect_server(),
    ):
        pass


def test_an_own_server_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import temporary_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_BOOT", "print('no such luck')")
    with temporary_settings({"api.url": None}), pytest.raises(QRPOError, match=r"did not start.*server\.log"):
        PrefectServer().start().wait_ready()
    assert (tmp_path / "qrpo-server.log").read_text() == "no such luck\n"
    assert "PREFECT_API_URL" not in os.environ


def test_the_configured_address_is_found_without_prefect_in_the_environment(
    tmp_path: Path, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "profiles.toml").write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://10.0.0.1:4200/api"\n'
    )
    script = "import flows.service.server as s; print(s._configured_url())"
    run = begin(script, PREFECT_HOME=str(tmp_path))
    assert run.communicate(timeout=300)[0] == "http://10.0.0.1:4200/api\n"


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    quiet_console()
    assert os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "INFO"


def test_every_setting_is_one_that_prefect_knows() -> None:
    from prefect.settings import get_current_settings

    known = get_current_settings().to_environment_variables(include_aliases=True)
    assert set(module._OWN_ENVIRONMENT) - set(known) == {"DO_NOT_TRACK"}
