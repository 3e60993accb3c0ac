"""The Prefect server of a run: the configured one, or one of its own for as long as the run lasts.

Importing this module imports neither Prefect nor anything heavy, so a server can boot meanwhile::

    quiet_console()                           # before Prefect is imported
    server = PrefectServer().start()          # returns at once
    from flows.align import align             # Prefect, torch: the server boots meanwhile
    with prefect_server(server) as server:    # waits until it answers
        align(config)                         # shown at server.ui_url

It is the server at PREFECT_API_URL where that is configured (environment, profile, prefect.toml). Else it is
a child process on a free port of 127.0.0.1 with its database in PREFECT_HOME, where `make serve` shows the
run afterwards. It gets no signal from the terminal, and dies with its parent.

Two runs at once have a server each, on one database. A shared one would have to outlive whoever started it,
and does not help against SQLite's "database is locked": three runs met it 38 times on one server, 24 times on
three; the client asked again and nothing was lost. Only the database's migration is done by one at a time.
For many runs at once, configure one server on PostgreSQL.
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

from flows.gc_thread import collect_in_a_thread
from flows.seen_runs import SeenRuns
from qrpo_core.die_with_parent import die_with_parent
from qrpo_core.errors import ConfigError, QRPOError
from tasks.interrupts import interrupted

#: What a Prefect server of ours is started with, unless the environment says otherwise. Batches (default 1)
#: cut its lag behind 2,000 tasks from 57 s to 7 s; a batch that is not full waits for the flush interval
#: (default 5 s), and so does the end of a run; leases on disk free a killed run's slots after a restart.
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

# A run's own server leaves alone what belongs to one that stays: deployments, workers, automations.
_OFF = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "TRIGGERS")
_OWN_ENVIRONMENT = {**SERVER_ENVIRONMENT, **{f"PREFECT_SERVER_SERVICES_{s}_ENABLED": "false" for s in _OFF}}
#: Seconds between the heartbeats of a run; the server of a service takes one without for dead.
HEARTBEAT = 30
#: The log of a run has what the project's own loggers say, lines of training processes and engines among
#: them; what they say outside a run is on the console alone.
OWN_LOGGERS = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qrpo",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
# What Prefect's client reads when it is imported: warnings and errors on the console, every log in the API.
_CLIENT_ENVIRONMENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
    **OWN_LOGGERS,
    "DO_NOT_TRACK": "1",
}
#: `user:password`: what Prefect's clients send, and what its server asks for.
AUTH = "PREFECT_API_AUTH_STRING"
SERVER_AUTH = "PREFECT_SERVER_API_AUTH_STRING"

_logger = logging.getLogger("qrpo.server")
# Run in the child, without the working directory on its path; our root counts where we are not installed.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from flows.server import _child; _child(*sys.argv[2:])"


def quiet_console() -> None:
    """Keep Prefect's console to warnings and errors; call it before Prefect is imported."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class PrefectServer:
    """The server that records a run. After `start`: `url` of its API, `own` if it is our child, its `log`."""

    def __init__(self) -> None:
        self.url = ""
        self.own = False
        self.log: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self.seen = SeenRuns()

    @property
    def ui_url(self) -> str:
        """Where the run is shown."""
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
        root = str(Path(__file__).resolve().parents[1])
        # The port is taken here and handed over open: no other process can take it in between, and whoever
        # connects is answered as soon as the child accepts.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, self.log.open("ab") as log:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, root, str(listener.fileno()), str(os.getpid())],
                env={**_OWN_ENVIRONMENT, **_for_own_clients(), "PREFECT_SERVER_UI_API_URL": self.url},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the run, which still needs the server to record that
            )
        atexit.register(self.stop)
        # For what is imported and started from now on, Prefect's background threads and children included.
        os.environ["PREFECT_API_URL"] = self.url
        return self

    def wait_ready(self, timeout: float = 120.0) -> PrefectServer:
        """Return when the server answers; raise a QRPOError if it does not."""
        for used_by_the_first_flow in ("prefect.flow_engine", "fastapi.encoders"):
            importlib.import_module(used_by_the_first_flow)  # while the server still boots

        # Asked once: our own socket listens since `start`, answers when the child is up, breaks if it dies.
        try:
            error = ask(self.url, timeout if self.own else min(timeout, 30.0))
        except ConfigError:
            self.stop()
            raise
        if error is None:
            return self
        self.stop()
        if self.own:
            what, where = "the run's own Prefect server did not start", str(self.log)
            remedy = "read the end of that log, or set PREFECT_API_URL to a running server (make serve)"
        else:
            what, where = f"no Prefect server answers at {self.url}", "PREFECT_API_URL"
            remedy = "start it (make serve), or unset it and the run starts a server of its own"
        raise QRPOError(f"{what} ({error!r})", where=where, remedy=remedy)

    def settle(self, timeout: float = 15.0) -> bool:
        """Send what is queued here; wait until the server has recorded how each task run of ours ended.

        Returns whether it has. Gives up after `timeout` seconds, or when nothing has moved for three: a task
        run that never started does not end. A configured server goes on without us: nothing to wait for.
        """
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        deadline = time.monotonic() + timeout
        APILogWorker.drain_all(timeout=timeout)
        EventsWorker.drain_all(timeout=max(0.0, deadline - time.monotonic()))
        lacking, moved = -1, time.monotonic()
        while self.own and time.monotonic() < min(deadline, moved + 3.0):
            try:
                now_lacking = self.seen.lacking()
            except Exception:  # whatever the client met must not hide how the run itself ended
                return False
            if now_lacking == 0:
                return True
            if now_lacking != lacking:
                lacking, moved = now_lacking, time.monotonic()
            time.sleep(0.1)
        return not self.own

    def stop(self, grace: float = 10.0) -> None:
        """End the child, if any: SIGTERM (it writes what it holds), after `grace` seconds SIGKILL."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork of the run does not end its server
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
            # Also when a second Ctrl-C breaks the wait. The database is in WAL mode: a kill costs it nothing.
            process.kill()
            process.wait()


@contextlib.contextmanager
def prefect_server(server: PrefectServer | None = None, *, settle: float = 15.0) -> Iterator[PrefectServer]:
    """Run a block against a Prefect server; stop it afterwards if it is our own.

    `server` is one that was started earlier, to boot while other things were imported; `settle` is the most
    seconds to wait at the end until it has recorded every task run.
    """
    server = server or PrefectServer()
    try:
        server.start().wait_ready()
        from prefect.settings import temporary_settings

        # Nothing listens for heartbeats, and each flow run would wait up to a second for their thread.
        own: dict[Any, Any] = {"api.url": server.url, "flows.heartbeat_frequency": None}
        settings = temporary_settings(updates=own if server.own else {})
        with settings, server.seen.watching(), _failures_told(server.url):
            try:
                yield server
            finally:
                if not server.settle(settle):
                    _logger.warning("the Prefect server may not show how every task of this run ended")
    finally:
        server.stop()


@contextlib.contextmanager
def _failures_told(url: str) -> Iterator[None]:
    """Make a QRPOError of a failure of the server at `url`, or of the network before it, within the block."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        request = getattr(error, "_request", None)  # `error.request` raises where there is none
        if request is None or not str(request.url).startswith(url) or interrupted(error):
            raise
        answer = getattr(error, "response", None)
        said = f"status {answer.status_code}" if answer is not None else repr(error)
        raise QRPOError(
            f"the Prefect server at {url} failed ({said})",
            where=f"{request.method} {request.url.path}",
            remedy="look at its log and run again: what was committed stays; SQLite serves one run at a time",
        ) from error


def ask(url: str, patience: float = 30.0) -> Exception | None:
    """Ask the server at a URL of its API once whether it works for us; what it or the network said if not.

    Raises ConfigError if it asks for another user and password than ours.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings, temporary_settings

    once: dict[Any, Any] = {"api.url": url, "api.request_timeout": patience, "client.max_retries": 0}
    try:
        with temporary_settings(updates=once), get_client(sync_client=True) as client:
            if (error := client.api_healthcheck()) is None:  # which everybody may ask
                client.request("GET", "/admin/version")
            return error
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 401:
            return error
        ours = "is not" if get_current_settings().api.auth_string else "is not set to"
        raise ConfigError(
            f"{AUTH} {ours} what the Prefect server at {url} asks for",
            remedy=f"set {AUTH} to the user:password that the server was started with",
        ) from None


def _for_own_clients() -> dict[str, str]:
    """Our environment for a server of our own: it asks for what we send, whatever another server asks for."""
    environment = {name: value for name, value in os.environ.items() if name != SERVER_AUTH}
    return {**environment, SERVER_AUTH: environment[AUTH]} if environment.get(AUTH) else environment


def _home() -> Path:
    """Prefect's folder, found without importing Prefect, made if it is not there."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


def _configured_url() -> str | None:
    """PREFECT_API_URL from wherever Prefect takes it. Prefect is imported only if it can be set somewhere."""
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
    """The child's life: serve on the socket it was handed until it is told to stop, or its parent dies."""
    die_with_parent(int(parent))
    serve_on(socket.socket(fileno=int(listener)))


def serve_on(listener: socket.socket, before: Callable[[], Awaitable[None]] | None = None) -> None:
    """Run Prefect's app on a listening socket until SIGTERM or Ctrl-C, which then is raised.

    before : called alone, before the app's services start.
    """
    gc.disable()  # what is imported here stays: not looking through it saves a sixth of the start
    import uvicorn
    from prefect.server.api.server import create_app

    gc.freeze()
    collect_in_a_thread()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            import fcntl

            with (_home() / "qrpo-server.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: this migrates the database
                if before is not None:
                    await before()
                await super().startup(sockets=sockets)

    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on")
    config.timeout_graceful_shutdown = 2  # an open page of the UI holds a connection
    Server(config).run(sockets=[listener])
