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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core.die_with_parent import die_with_parent
from qrpo_core.errors import ConfigError, QRPOError

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
# What Prefect's client reads when it is imported: warnings and errors on the console, every log in the API.
_CLIENT_ENVIRONMENT = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING", "DO_NOT_TRACK": "1"}

_logger = logging.getLogger("qrpo.server")
_TERMINAL = ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]
_OPEN = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]
# Run in the child, without the working directory on its path; our root counts where we are not installed.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from flows.server import _child; _child(*sys.argv[2:])"


def quiet_console() -> None:
    """Keep Prefect's console to warnings and errors; call it before Prefect is imported."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Whether the console shows it. Not a QRPOError or Ctrl-C: the flow raises them, and its caller has one
    line for it where Prefect has several, or a traceback, for the task and for every flow around it."""
    if not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
        return True
    told = isinstance((record.exc_info or (None, None))[1], QRPOError)
    ended = ("Finished in state", "Crash detected! Execution was aborted by an interrupt")
    return not (told or record.getMessage().startswith(ended))


class PrefectServer:
    """The server that records a run. After `start`: `url` of its API, `own` if it is our child, its `log`."""

    def __init__(self) -> None:
        self.url = ""
        self.own = False
        self.log: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self.seen = _SeenRuns()

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
                env={**_OWN_ENVIRONMENT, **os.environ, "PREFECT_SERVER_UI_API_URL": self.url},
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
        from prefect.client.orchestration import get_client
        from prefect.settings import temporary_settings

        # Asked once: our own socket listens since `start`, answers when the child is up, breaks if it dies.
        patience = timeout if self.own else min(timeout, 30.0)
        once: dict[Any, Any] = {"api.url": self.url, "api.request_timeout": patience, "client.max_retries": 0}
        with temporary_settings(updates=once), get_client(sync_client=True) as client:
            error = client.api_healthcheck()
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
        with temporary_settings(updates=own if server.own else {}), server.seen.watching():
            try:
                yield server
            finally:
                if not server.settle(settle):
                    _logger.warning("the Prefect server may not show how every task of this run ended")
    finally:
        server.stop()


class _SeenRuns(logging.Handler):
    """The flow and task runs of this process, gathered from the ids on their log records.

    Task runs reach the server as events, and it cannot be asked about one that it has not heard of yet.
    Every run logs how it ended, so the loggers know them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[str, set[str]] = {"flow_run_id": set(), "task_run_id": set()}

    def emit(self, record: logging.LogRecord) -> None:
        """Note the ids; nothing is written."""
        for name, ids in self.ids.items():
            ids |= {str(value)} if (value := getattr(record, name, None)) else set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen to Prefect's run loggers for the length of the block, and keep its console to the point."""
        from prefect.logging.handlers import PrefectConsoleHandler

        loggers = [logging.getLogger("prefect.flow_runs"), logging.getLogger("prefect.task_runs")]
        consoles = [h for h in logging.getLogger().handlers if isinstance(h, PrefectConsoleHandler)]
        with contextlib.ExitStack() as stack:
            for logger in loggers:
                logger.addHandler(self)
                stack.callback(logger.removeHandler, self)
            for console in consoles:
                console.addFilter(_worth_a_line)
                stack.callback(console.removeFilter, _worth_a_line)
            yield

    def lacking(self) -> int:
        """How many task runs the server has not yet recorded as ended."""
        from prefect.client.orchestration import get_client

        total = len(self.ids["task_run_id"])
        asked = (("flow_run_id", "flow_run_id", _OPEN, 1), ("id", "task_run_id", _TERMINAL, -1))
        with get_client(sync_client=True) as client:
            for field, name, states, sign in asked:
                ids = sorted(self.ids[name])
                for i in range(0, len(ids), 500):  # a database's limit on parameters
                    wanted = {field: {"any_": ids[i : i + 500]}, "state": {"type": {"any_": states}}}
                    answer = client.request("POST", "/task_runs/count", json={"task_runs": wanted})
                    total += sign * int(answer.json())
        return total


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
    _serve(socket.socket(fileno=int(listener)))


def _serve(listener: socket.socket) -> None:
    """Run Prefect's app on a listening socket."""
    gc.disable()  # what is imported here stays: not looking through it saves a sixth of the start
    import uvicorn
    from prefect.server.api.server import create_app

    gc.freeze()
    gc.enable()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            import fcntl

            with (_home() / "qrpo-server.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: this migrates the database
                await super().startup(sockets=sockets)

    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on")
    config.timeout_graceful_shutdown = 2  # an open page of the UI holds a connection
    Server(config).run(sockets=[listener])


def main() -> None:
    """`make serve`: serve at PREFECT_SERVER_API_HOST and _PORT (127.0.0.1:4200) until Ctrl-C."""
    for name, value in SERVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from prefect.settings import get_current_settings

    api = get_current_settings().server.api
    address = f"http://{api.host}:{api.port}"
    if api.host not in ("127.0.0.1", "localhost", "::1") and not api.auth_string:
        what = f"without authentication, whoever reaches {address} can run commands on its workers"
        remedy = "set PREFECT_SERVER_API_AUTH_STRING=user:password, or bind 127.0.0.1"
        raise ConfigError(what, where="PREFECT_SERVER_API_HOST", remedy=remedy)
    try:
        listener = socket.create_server((api.host, api.port), backlog=128)
    except OSError as error:
        remedy = "stop what listens there, or set PREFECT_SERVER_API_PORT"
        raise QRPOError(f"cannot listen: {error.strerror}", where=address, remedy=remedy) from error
    print(f"Prefect UI: {address}\nFor runs to use it: export PREFECT_API_URL={address}/api", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(listener)


if __name__ == "__main__":
    try:
        main()
    except QRPOError as error:
        sys.exit(f"error: {error}")
