"""`make serve`: the server of a service, in the foreground until Ctrl-C.

All is set by Prefect's own variables, in the environment:

- PREFECT_SERVER_API_HOST, PREFECT_SERVER_API_PORT: where it listens; 127.0.0.1:4200 if unset.
- PREFECT_API_DATABASE_CONNECTION_URL: postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE; SQLite in
  PREFECT_HOME if unset.
- PREFECT_API_AUTH_STRING=user:password: the server asks for it, and for a CSRF token with every request that
  changes something. The same variable is what `make deploy`, `make workers` and `qrpo run` send.
- PREFECT_UI_URL: where its users reach it, for links in notifications; the above if that is loopback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import MutableMapping

from flows.automations import give_time
from flows.server import AUTH, HEARTBEAT, SERVER_AUTH, SERVER_ENVIRONMENT, serve_on
from qrpo_core.errors import ConfigError, QRPOError

DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"
_CSRF = "PREFECT_SERVER_CSRF_PROTECTION_ENABLED"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

#: What a run of a service has in its environment, unless ours says otherwise. A run asks again for 8.5
#: minutes (2 + 4 + … + 256 s; Prefect's default is one) while its server is away: it may be restarted.
RUN_ENVIRONMENT: dict[str, str] = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
    "PREFECT_CLIENT_MAX_RETRIES": "8",
}


def set_up(environment: MutableMapping[str, str]) -> None:
    """Put into the environment of a server what its operator has not: settings, authentication, CSRF.

    Raises ConfigError for an authentication string that is none.
    """
    for name, value in SERVER_ENVIRONMENT.items():
        environment.setdefault(name, value)
    host = environment.get("PREFECT_SERVER_API_HOST", _LOOPBACK[0])
    if host in _LOOPBACK:  # links in notifications; from elsewhere, only the operator knows its address
        port = environment.get("PREFECT_SERVER_API_PORT", "4200")
        environment.setdefault("PREFECT_UI_URL", f"http://{host}:{port}")
    if auth := environment.get(AUTH):
        environment.setdefault(SERVER_AUTH, auth)
    if asked := environment.get(SERVER_AUTH):
        user, colon, password = asked.partition(":")
        if not (user and colon and password):
            where = AUTH if auth else SERVER_AUTH  # the value is a secret: it is not shown
            raise ConfigError("it is not of the form user:password", where=where, remedy="set or unset it")
        environment.setdefault(_CSRF, "true")


def database() -> str:
    """The database that is configured, without its password; ConfigError for a kind that does not work."""
    from prefect.settings import get_current_settings
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    secret = get_current_settings().server.database.connection_url
    remedy = "write postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE, or unset it for SQLite"
    try:
        url = make_url(secret.get_secret_value() if secret else "")
    except ArgumentError:  # it quotes the text, password and all
        raise ConfigError("it is not the URL of a database", where=DATABASE, remedy=remedy) from None
    if url.drivername not in ("postgresql+asyncpg", "sqlite+aiosqlite"):
        raise ConfigError(f"{url.drivername!r} does not work here", where=DATABASE, remedy=remedy)
    return url.render_as_string(hide_password=True)


def main() -> None:
    """Serve until Ctrl-C. Raises ConfigError for settings that are refused, QRPOError if it cannot listen."""
    set_up(os.environ)
    from prefect.settings import get_current_settings

    api, kept_in = get_current_settings().server.api, database()
    address = f"http://{api.host}:{api.port}"
    if api.host not in _LOOPBACK and not api.auth_string:
        what = f"without authentication, whoever reaches {address} can run commands on its workers"
        remedy = f"set {AUTH}=user:password, or bind 127.0.0.1"
        raise ConfigError(what, where="PREFECT_SERVER_API_HOST", remedy=remedy)
    try:
        listener = socket.create_server((api.host, api.port), backlog=128)
    except OSError as error:
        remedy = "stop what listens there, or set PREFECT_SERVER_API_PORT"
        raise QRPOError(f"cannot listen: {error.strerror}", where=address, remedy=remedy) from error
    asks = f"it asks for {AUTH}" if api.auth_string else "open to this machine's users"
    print(f"Prefect UI: {address}\nFor runs to use it: export PREFECT_API_URL={address}/api")
    print(f"Database: {kept_in}\nAuthentication: {asks}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve_on(listener, give_time)


if __name__ == "__main__":
    try:
        main()
    except QRPOError as error:
        sys.exit(f"error: {error}")
