"""The Prefect server that records a run: the configured one, or a child process that ends with the run.

This module imports neither Prefect nor anything heavy, so that a server boots while they are imported::

    quiet_console()                           # before Prefect is imported
    server = PrefectServer().start()          # returns at once
    from flows.align import align             # Prefect, torch: the server boots meanwhile
    with prefect_server(server) as server:    # waits until it answers
        align(config)                         # shown at server.ui_url

The server is the one at PREFECT_API_URL where that is configured (environment, profile, prefect.toml). Else
it is a child process on a free port of 127.0.0.1 with its database in PREFECT_HOME, where `make serve` shows
the run afterwards. Prefect's own temporary server cannot replace it: it starts after Prefect's import, gets
the terminal's Ctrl-C before the run has recorded its end, and outlives a run that is killed.

Two runs at once start two servers on one database. One shared server would have to outlive the run that
started it, and does not prevent SQLite's "database is locked": three runs met it 38 times with one server, 24
times with three, and the client's retries lost nothing. Servers migrate the database one at a time. For many
runs at once, configure one server on PostgreSQL.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from flows.service.garbage_collection import collect_in_thread
from flows.service.run_tracker import RunTracker
from qrpo_core.common.die_with_parent import die_with_parent
from qrpo_core.common.errors import ConfigError, QRPOError
from tasks.interrupts import is_interrupt

#: Settings of our Prefect servers; the environment overrides them. Batches (default 1) cut the recorder's lag
#: behind 2,000 tasks from 57 s to 7 s. A batch that is not full waits for the flush interval (default 5 s),
#: and so does the end of a run. Leases on disk free a killed run's slots after a restart.
SERVER_ENVIRONMENT: dict[str, str] = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
}

# Deployments, workers and automations belong to a server that stays, so a run's own server leaves them alone.
_OFF = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "TRIGGERS")
_OWN_ENVIRONMENT = {**SERVER_ENVIRONMENT, **{f"PREFECT_SERVER_SERVICES_{s}_ENABLED": "false" for s in _OFF}}
#: Seconds between the heartbeats of a run. A service marks a run Crashed when they stop (automations.py).
HEARTBEAT = 30
#: Sends the lines of the project's loggers, training processes and engines included, to the run's log; lines
#: from outside a run appear on the console alone.
LOGGING_ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qrpo",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
# Settings that Prefect reads at import: warnings and errors on the console, every line in the run's log.
_CLIENT_ENVIRONMENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
    **LOGGING_ENVIRONMENT,
    "DO_NOT_TRACK": "1",
}
#: `user:password` that Prefect's clients send, and that its server requires.
AUTH = "PREFECT_API_AUTH_STRING"
SERVER_AUTH = "PREFECT_SERVER_API_AUTH_STRING"

_logger = logging.getLogger("qrpo.server")
# The child's program. Its path lacks the working directory; our root counts where we are not installed.
_BOOT = "import sys; sys.path.append(sys.argv[1]); "
_BOOT += "from flows.service.server import _child; _child(*sys.argv[2:])"


def quiet_console() -> None:
    """Keep Prefect's console to warnings and errors; call it before Prefect is imported."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class PrefectServer:
    """The server that records a run.

    After `start`: `url` of its API; `own`, whether it is our child; `log`, the child's log file.
    """

    def __init__(self) -> None:
        self.url = ""
        self.own = False
        self.log: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self.tracker = RunTracker()

    @property
    def ui_url(self) -> str:
        """Address of the UI."""
        from prefect.settings import get_current_settings

        return (not self.own and get_current_settings().ui_url) or self.url.removesuffix("/api")

    def start(self) -> PrefectServer:
        """Find the configured server, or start one; return without waiting for it.

        Call it in the main thread: Linux kills the child with the thread that started it.
        """
        self.url = self.url or _configured_url() or ""
        if self.url:
            return self
        self.own, self.log = True, _home() / "qrpo-server.log"
        root = str(Path(__file__).resolve().parents[2])
        # The child inherits a listening socket: no other process can take the port in between, and a client
        # that connects early waits until the child accepts.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, self.log.open("ab") as log:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, root, str(listener.fileno()), str(os.getpid())],
                env={**_OWN_ENVIRONMENT, **_with_our_password(), "PREFECT_SERVER_UI_API_URL": self.url},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the run, which still needs the server to record that
            )
        atexit.register(self.stop)
        # For Prefect's import, its background threads and our children.
        os.environ["PREFECT_API_URL"] = self.url
        return self

    def wait_ready(self, timeout: float = 120.0) -> PrefectServer:
        """Wait until the server answers; QRPOError if it does not."""
        for used_by_the_first_flow in ("prefect.flow_engine", "fastapi.encoders"):
            importlib.import_module(used_by_the_first_flow)  # while the server still boots

        # One request is enough: our socket listens since `start`, answers when the child is up, and breaks if
        # the child dies.
        try:
            error = server_error(self.url, timeout if self.own else min(timeout, 30.0))
        except ConfigError:
            self.stop()
            raise
        if error is None:
            return self
        self.stop()
        if self.own:
            what, where = "the Prefect server of this run did not start", str(self.log)
            remedy = "read the end of that log, or set PREFECT_API_URL to a running server (make serve)"
        else:
            what, where = f"no Prefect server answers at {self.url}", "PREFECT_API_URL"
            remedy = "start it (make serve), or unset it and the run starts a server of its own"
        raise QRPOError(f"{what} ({error!r})", where=where, remedy=remedy)

    def flush(self, timeout: float = 15.0) -> bool:
        """Send queued logs and events; wait until our own server has recorded the end of every task run.

        Returns whether it has. Gives up after `timeout` seconds, or after three without progress: a task run
        that never started does not end. A configured server keeps running, so nothing is waited for.
        """
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        deadline = time.monotonic() + timeout
        APILogWorker.drain_all(timeout=timeout)
        EventsWorker.drain_all(timeout=max(0.0, deadline - time.monotonic()))
        unrecorded, moved = -1, time.monotonic()
        while self.own and time.monotonic() < min(deadline, moved + 3.0):
            try:
                now = self.tracker.unrecorded()
            except Exception:  # an error here must not hide how the run itself ended
                return False
            if now == 0:
                return True
            if now != unrecorded:
                unrecorded, moved = now, time.monotonic()
            time.sleep(0.1)
        return not self.own

    def stop(self, grace: float = 10.0) -> None:
        """End the child, if any: SIGTERM, on which it writes its batches; SIGKILL after `grace` seconds."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork of the run must not end its server
            return
        atexit.unregister(self.stop)
        if os.environ.get("PREFECT_API_URL") == self.url:
            del os.environ["PREFECT_API_URL"]
        try:
            process.terminate()
            process.wait(grace)
        except subprocess.TimeoutExpired:
            _logger.warning("the Prefect server did not end in %s s and was killed [%s]", grace, self.log)
        finally:
            # Also after a second Ctrl-C. The database is in WAL mode: a kill does not damage it.
            process.kill()
            process.wait()


@contextlib.contextmanager
def prefect_server(
    server: PrefectServer | None = None, *, flush_seconds: float = 15.0
) -> Iterator[PrefectServer]:
    """Run a block against a Prefect server; stop it afterwards if it is our own.

    server : one that was started earlier, so that it boots while other things are imported.
    flush_seconds : longest wait at the end for the server to record every task run.
    """
    server = server or PrefectServer()
    try:
        server.start().wait_ready()
        from prefect.settings import temporary_settings

        # Nothing on our own server listens to heartbeats, and each flow run waits up to 1 s for their thread.
        own: dict[Any, Any] = {"api.url": server.url, "flows.heartbeat_frequency": None}
        settings = temporary_settings(updates=own if server.own else {})
        with settings, server.tracker.tracking(), server_errors_in_one_line(server.url):
            try:
                yield server
            finally:
                if not server.flush(flush_seconds):
                    _logger.warning("the Prefect server may not show how every task of this run ended")
    finally:
        server.stop()


@contextlib.contextmanager
def server_errors_in_one_line(url: str) -> Iterator[None]:
    """Raise a QRPOError where the server at `url`, or the network to it, fails within the block."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        request = getattr(error, "_request", None)  # `error.request` raises where there is none
        if request is None or not str(request.url).startswith(url) or is_interrupt(error):
            raise
        answer = getattr(error, "response", None)
        failure = f"status {answer.status_code}" if answer is not None else repr(error)
        raise QRPOError(
            f"the Prefect server at {url} failed ({failure})",
            where=f"{request.method} {request.url.path}",
            remedy="read its log and run again (committed results stay); SQLite serves one run at a time",
        ) from error


def server_error(url: str, patience: float = 30.0) -> Exception | None:
    """Send one request to the server at the URL of its API; returns the error, None if it answers.

    Raises ConfigError if it requires another user and password than ours.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings, temporary_settings

    once: dict[Any, Any] = {"api.url": url, "api.request_timeout": patience, "client.max_retries": 0}
    try:
        with temporary_settings(updates=once), get_client(sync_client=True) as client:
            if (error := client.api_healthcheck()) is None:  # needs no password
                client.request("GET", "/admin/version")
            return error
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 401:
            return error
        ours = "is not" if get_current_settings().api.auth_string else "is not set to"
        raise ConfigError(
            f"{AUTH} {ours} what the Prefect server at {url} requires",
            remedy=f"set {AUTH} to the user:password that the server was started with",
        ) from None


def _with_our_password() -> dict[str, str]:
    """Our environment for our own server, which requires the password that our clients send."""
    environment = {name: value for name, value in os.environ.items() if name != SERVER_AUTH}
    return {**environment, SERVER_AUTH: environment[AUTH]} if environment.get(AUTH) else environment


def _home() -> Path:
    """Prefect's folder, created if it is missing; found without importing Prefect."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


def _configured_url() -> str | None:
    """PREFECT_API_URL from any place that Prefect reads. Imports Prefect only where such a place exists."""
    texts = {".env": "PREFECT_", "prefect.toml": "", "pyproject.toml": "[tool.prefect"}
    if (
        "prefect" in sys.modules
        or any(map(os.environ.get, ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")))
        or (_home() / "profiles.toml").exists()
        or any(Path(n).is_file() and t in Path(n).read_text(errors="replace") for n, t in texts.items())
    ):
        from prefect.settings import get_current_settings

        return get_current_settings().api.url
    return None


def _child(listener: str, parent: str) -> None:
    """Body of the child: serve on the inherited socket until SIGTERM, or until the parent dies."""
    die_with_parent(int(parent))
    serve_on(socket.socket(fileno=int(listener)))


def serve_on(listener: socket.socket, before: Callable[[], Awaitable[None]] | None = None) -> None:
    """Run Prefect's app, with our pages, on a listening socket until SIGTERM or Ctrl-C, which is then raised.

    before : awaited before the app's services start, by one server at a time.
    """
    gc.disable()  # without collections the imports take a sixth less time
    import uvicorn

    from flows.service.pages import service_app

    gc.freeze()
    collect_in_thread()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            import fcntl

            with (_home() / "qrpo-server.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: this migrates the database
                if before is not None:
                    await before()
                await super().startup(sockets=sockets)

    config = uvicorn.Config(service_app, factory=True, log_level="error", lifespan="on")
    config.timeout_graceful_shutdown = 2  # an open page of the UI holds a connection
    Server(config).run(sockets=[listener])
