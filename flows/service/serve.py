"""`make serve`: the server of a service, in the foreground until Ctrl-C.

Environment variables configure it, all but one Prefect's own:

- PREFECT_SERVER_API_HOST, PREFECT_SERVER_API_PORT: the address it listens on; 127.0.0.1:4200 if unset.
- PREFECT_API_DATABASE_CONNECTION_URL: postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE; SQLite in
  PREFECT_HOME if unset.
- PREFECT_API_AUTH_STRING=user:password: the server requires it, and a CSRF token with every request that
  changes something. `make deploy`, `make workers` and `qrpo run` send it from the same variable.
- QRPO_STORES: the stores whose runs and reports it shows (`flows/service/pages.py`).
- PREFECT_UI_URL: the address of the UI in notifications; by default the address above if that is loopback.

It is not `prefect server start`: that command lacks the refusals below, the garbage collection thread, and
the new heartbeat deadlines after a restart.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import MutableMapping

from flows.service.automations import restart_heartbeat_deadlines
from flows.service.server import AUTH, HEARTBEAT, SERVER_AUTH, SERVER_ENVIRONMENT, serve_on
from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.common.extras import require
from tasks.page_links import PREFIX, STORES, stores

DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"
_CSRF = "PREFECT_SERVER_CSRF_PROTECTION_ENABLED"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: Settings of a service's runs; the environment overrides them. While the server restarts, a run retries for
#: 8.5 minutes (2 + 4 + … + 256 s; Prefect's default is one minute).
RUN_ENVIRONMENT: dict[str, str] = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
    "PREFECT_CLIENT_MAX_RETRIES": "8",
}


def set_up(environment: MutableMapping[str, str]) -> None:
    """Fill in the settings that the operator left unset: batches, authentication, CSRF, UI address.

    Raises ConfigError unless the authentication string is user:password.
    """
    for name, value in SERVER_ENVIRONMENT.items():
        environment.setdefault(name, value)
    host = environment.get("PREFECT_SERVER_API_HOST", _LOOPBACK[0])
    if host in _LOOPBACK:  # elsewhere only the operator knows the address
        port = environment.get("PREFECT_SERVER_API_PORT", "4200")
        environment.setdefault("PREFECT_UI_URL", f"http://{host}:{port}")
    if auth := environment.get(AUTH):
        environment.setdefault(SERVER_AUTH, auth)
    if required := environment.get(SERVER_AUTH):
        user, colon, password = required.partition(":")
        if not (user and colon and password):
            where = AUTH if auth else SERVER_AUTH  # its value is a secret and not shown
            raise ConfigError("it is not of the form user:password", where=where, remedy="set or unset it")
        environment.setdefault(_CSRF, "true")


def database() -> str:
    """The configured database without its password; ConfigError unless PostgreSQL or SQLite."""
    from prefect.settings import get_current_settings
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    secret = get_current_settings().server.database.connection_url
    remedy = "write postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE, or unset it for SQLite"
    try:
        url = make_url(secret.get_secret_value() if secret else "")
    except ArgumentError:  # its message contains the password
        raise ConfigError("it is not the URL of a database", where=DATABASE, remedy=remedy) from None
    if url.drivername not in ("postgresql+asyncpg", "sqlite+aiosqlite"):
        raise ConfigError(f"{url.drivername!r} is not supported", where=DATABASE, remedy=remedy)
    return url.render_as_string(hide_password=True)


def main() -> None:
    """Serve until Ctrl-C. Raises ConfigError for refused settings, QRPOError if the port is taken."""
    require("prefect", "the server")
    set_up(os.environ)
    from prefect.settings import get_current_settings

    api, database_url = get_current_settings().server.api, database()
    address = f"http://{api.host}:{api.port}"
    if api.host not in _LOOPBACK and not api.auth_string:
        what = f"without authentication, anyone who reaches {address} can run commands on its workers"
        remedy = f"set {AUTH}=user:password, or bind 127.0.0.1"
        raise ConfigError(what, where="PREFECT_SERVER_API_HOST", remedy=remedy)
    try:
        listener = socket.create_server((api.host, api.port), backlog=128)
    except OSError as error:
        remedy = "stop the process that listens there, or set PREFECT_SERVER_API_PORT"
        raise QRPOError(f"cannot listen: {error.strerror}", where=address, remedy=remedy) from error
    access = f"requires {AUTH}" if api.auth_string else "none: open to every user of this machine"
    print(f"Prefect UI: {address}\nFor runs to use it: export PREFECT_API_URL={address}/api")
    print(f"Database: {database_url}\nAuthentication: {access}")
    print(f"Runs and reports: {address}{PREFIX}/runs, of {STORES}={' '.join(stores())}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve_on(listener, restart_heartbeat_deadlines)


if __name__ == "__main__":
    try:
        main()
    except QRPOError as error:
        sys.exit(f"error: {error}")
