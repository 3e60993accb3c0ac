"""A service on PostgreSQL: a real one of Debian's package, on loopback, in a folder of the test."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service.deploy import ROOT
from flows.service.serve import DATABASE

PASSWORD = f"pass{secrets.token_hex(12)}"
RUNS = 3


def _programs() -> Path:
    """Where initdb and postgres are; Debian keeps them off the path."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in found:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")


@pytest.fixture(scope="module")
def postgres() -> Iterator[tuple[str, Path]]:
    """URL of an empty database, and the log of its server, which tells of every wait for a lock."""
    programs = _programs()
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(
        f"/tmp/qrpo-postgres-{secrets.token_hex(4)}"
    )  # the path of a socket is short; not root's own
    folder.mkdir(mode=0o755)
    (folder / "password").write_text(PASSWORD)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = None
    try:
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user, user)
        data, log = folder / "data", folder / "log"
        command = [programs / "initdb", "-D", data, "-U", "qrpo", "-A", "scram-sha-256", "--no-sync"]
        command += ["--pwfile", folder / "password", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run(command, user=user, cwd="/", check=True, capture_output=True)
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder}
        settings |= {"fsync": "off", "log_lock_waits": "on", "deadlock_timeout": "1s"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with log.open("wb") as out:
            command = [programs / "postgres", "-D", data, *options]
            server = subprocess.Popen(command, user=user, cwd="/", stdout=out, stderr=out)
        url = f"postgresql+asyncpg://qrpo:{PASSWORD}@127.0.0.1:{port}/postgres"
        deadline = time.monotonic() + 300
        while b"ready to accept connections" not in log.read_bytes():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url, log
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # a fast shutdown: it disconnects everybody
            server.wait(120)
        shutil.rmtree(folder)


@pytest.mark.service
def test_three_runs_at_once_complete_without_a_lock_error(
    postgres: tuple[str, Path], make_service: Callable[..., Any], write_experiment: Callable[..., Path]
) -> None:
    url, log = postgres
    service = make_service(**{DATABASE: url})
    service.serve(120)
    said = service.log("flows.service.serve")
    assert f"Database: {url.replace(PASSWORD, '***')}\n" in said.read_text()
    assert not (service.folder / "home/prefect.db").exists()
    runs = []
    for number in range(RUNS):
        command = [sys.executable, "-m", "flows.cli", "run", str(write_experiment(f"run-{number}"))]
        with service.log(f"run-{number}").open("wb") as out:
            runs.append(
                subprocess.Popen(
                    [*command, "--flow", "precompute"], cwd=ROOT, env=service.client, stdout=out, stderr=out
                )
            )
    for number, run in enumerate(runs):
        assert run.wait(900) == 0, service.log(f"run-{number}").read_text()
    found = service.ask("POST", "/flow_runs/filter")
    assert sorted((r["name"].partition(" · ")[0], r["state"]["type"]) for r in found) == [
        (f"precompute run-{number}", "COMPLETED") for number in range(RUNS)
    ]
    begun = [r["start_time"] for r in found]
    assert max(begun) < min(r["end_time"] for r in found)  # they were at it together
    for words in (
        said.read_text(),
        log.read_text(),
        *(service.log(f"run-{n}").read_text() for n in range(RUNS)),
    ):
        assert "lock" not in words.lower(), words
        assert PASSWORD not in words
    assert "ERROR" not in log.read_text(), log.read_text()
    # The back-up that docs/how-to/service.md names has it all.
    command = [_programs() / "pg_dump", url.replace("+asyncpg", "")]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(f"precompute run-{number} " in dump for number in range(RUNS))


@pytest.mark.service
def test_a_database_that_refuses_is_told_without_the_password(
    postgres: tuple[str, Path], make_service: Callable[..., Any]
) -> None:
    wrong = f"wrong{secrets.token_hex(8)}"
    service = make_service(**{DATABASE: postgres[0].replace(PASSWORD, wrong)})
    server = service.start("flows.service.serve")
    assert server.wait(600) != 0
    said = service.log("flows.service.serve").read_text()
    assert "password authentication failed" in said
    assert wrong not in said
