"""`/qrpo/` of a service's server: the runs of its stores and their pages, read-only.

- /qrpo/runs: every run and comparison of the stores, with links to their pages;
- /qrpo/report/KEY, /qrpo/compare/KEY, /qrpo/pool_report/KEY: the page of that artifact.

QRPO_STORES in the environment of `make serve` names the stores, separated by spaces; `.qrpo` if unset. A key
is 32 hex digits, and what it names is read through the manifest of that artifact and compared with its
digest: no part of a path comes from the address. The pages are behind the server's own authentication, and
their content policy lets a browser run nothing in them: they show text of models on the address of the UI.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.service.locked_database import RepeatLocked
from qrpo_core.common.errors import DamagedError, MissingError, QRPOError
from tasks.page_links import PAGES, PREFIX, STORES, page_address, stores

if TYPE_CHECKING:  # loaded with the first page, so that a run's server starts without them
    from qrpo_core.pipeline.run_ledger import RunLedger
    from qrpo_core.store.manifest import Manifest

_KEY = re.compile(r"[0-9a-f]{32}")
_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def service_app() -> ASGIApp:
    """Prefect's app with the pages of the stores, behind the same user and password.

    What the app refuses because its database is locked is repeated.
    """
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    server = get_current_settings().server
    secret, database = server.api.auth_string, server.database.connection_url
    app: ASGIApp = create_app()
    if database is None or database.get_secret_value().startswith("sqlite"):
        app = RepeatLocked(app)
    return with_pages(app, stores(), secret.get_secret_value() if secret else None)


def with_pages(app: ASGIApp, places: Sequence[str], password: str | None = None) -> ASGIApp:
    """`app` with the pages of the stores below /qrpo/.

    password : user:password that these pages ask for; None for everybody who reaches the server.
    """
    pages = _pages(places)

    async def both(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{PREFIX}/"):
            await app(scope, receive, send)
        elif password is None or _admitted(Request(scope), password):
            await pages(scope, receive, send)
        else:
            challenge = {"WWW-Authenticate": 'Basic realm="qrpo"', **_HEADERS}
            await PlainTextResponse("Unauthorized\n", 401, challenge)(scope, receive, send)

    return both


def _admitted(request: Request, password: str) -> bool:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    try:
        given = base64.b64decode(secret, validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(given, password.encode())


def _pages(places: Sequence[str]) -> Starlette:
    """The application below /qrpo/. Its functions are not async, so that reading blocks no request."""

    def runs(request: Request) -> Response:
        return HTMLResponse("\n".join(_runs_page(places)), headers=_HEADERS)

    def page(request: Request) -> Response:
        step, key = request.path_params["step"], request.path_params["key"]
        if step not in PAGES or _KEY.fullmatch(key) is None:
            return _none("There is no such page.", places)
        for place in places:
            try:
                return HTMLResponse(_stored_page(place, step, key), headers=_HEADERS)
            except MissingError:
                continue
            except QRPOError as error:
                return PlainTextResponse(f"{error}\n", 500, _HEADERS)
        return _none(f"No {step} {key} is in the stores of this server.", places)

    def other(request: Request) -> Response:
        return _none("There is no such page.", places)

    routes = [
        Route(f"{PREFIX}/runs", runs),
        Route(f"{PREFIX}/{{step}}/{{key}}", page),
        Route(f"{PREFIX}/{{rest:path}}", other),
        Route(PREFIX, other),
    ]
    return Starlette(routes=routes)


def _none(what: str, places: Sequence[str]) -> Response:
    known = f"Runs: {PREFIX}/runs. Stores: {' '.join(places)} ({STORES} of make serve names others)."
    return PlainTextResponse(f"{what}\n{known}\n", 404, _HEADERS)


@lru_cache(maxsize=16)
def _opened(place: str) -> RunLedger:
    from qrpo_core.config import StoreConfig
    from qrpo_core.pipeline.run_ledger import RunLedger

    return RunLedger(StoreConfig(path=place))


def _stored_page(place: str, step: str, key: str) -> bytes:
    """The HTML page of an artifact, compared with its digest; MissingError where the store has none."""
    from qrpo_core.store.manifest import parse_manifest

    ledger = _opened(place)
    name = f"artifacts/{step}/{key}/manifest.json"
    manifest = parse_manifest(ledger.objects.read(name), name)
    if (manifest.step, manifest.key) != (step, key) or not manifest.folder.isalnum():
        raise DamagedError("the manifest is of another artifact", where=name)
    return ledger.artifacts.read(manifest, PAGES[step])


def _runs_page(places: Sequence[str]) -> Iterator[str]:
    """A table of the runs of every store, the newest first."""
    from qrpo_core.inspection.runs import HEAD, OUTCOME, run_rows

    yield '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>'
    yield "body{font:14px system-ui;margin:2em}td,th{text-align:left;padding:.3em .8em;border-top:1px solid"
    yield "#ccc;vertical-align:top}td:nth-child(3),td:nth-child(7){"
    yield "white-space:nowrap}table{border-collapse:collapse}code,pre{font-size:12px}</style></head><body>"
    for place in places:
        yield f"<h1>Runs in <code>{escape(place)}</code></h1>"
        try:
            ledger = _opened(place)
            found = ledger.read_runs()  # there may be more than before
            rows = list(zip(run_rows(found), found, strict=True))
            compared = ledger.comparisons()
        except QRPOError as error:
            yield f"<p>{escape(str(error))}</p>"
            continue
        if not rows:
            yield "<p>No run.</p>"
            continue
        yield _row("th", [*map(escape, (*HEAD, *OUTCOME)), "report"], "<table>")
        for cells, run in reversed(rows):
            yield _row("td", [*map(escape, cells), _link(run.report)])
        yield "</table>"
        if compared:
            yield f"<p>Comparisons:</p><ul>{''.join(map(_compared, compared))}</ul>"
        yield "<p>Policies, by number of run:</p><pre>"
        yield from (
            escape(f"{run.number:>3}  {ledger.place(run.train, 'policy')}") for run in reversed(found)
        )
        yield "</pre><p><code>qrpo show RUN</code>, <code>qrpo diff RUN RUN</code> and <code>qrpo config "
        yield f"RUN</code> with <code>--store {escape(ledger.objects.url)}</code> say more of a run.</p>"
    yield "</body></html>"


def _compared(manifest: Manifest) -> str:
    config = manifest.recipe["config"]
    title = escape(f"{config['name']}, {manifest.created[:16].replace('T', ' ')}")
    runs = escape("; ".join(config["runs"]))
    return f'<li><a href="{page_address(manifest)}">{title}</a>: {runs}</li>'


def _row(tag: str, cells: Sequence[Any], before: str = "") -> str:
    return f"{before}<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _link(report: Manifest | None) -> str:
    return "" if report is None else f'<a href="{page_address(report)}">open</a>'
