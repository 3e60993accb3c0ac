"""Repeats what a Prefect server could not do because its SQLite database was locked.

A transaction of Prefect that reads before it writes fails at once if another one wrote in between, whatever
SQLite's time-out says; the server then answers 503 and has written nothing. Prefect's own client repeats such
a request. A browser does not: its user sees "Unknown error". So our servers repeat it themselves, and let one
request write at a time: SQLite has one writer anyway, and requests that take turns are not refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Seconds before each repetition, about 20 in all.
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)
#: How the paths of requests end that read, although they are sent by POST.
_READS = ("/filter", "/count", "/paginate", "/history", "/lateness", "/count-task-runs")


class RepeatLocked:
    """An ASGI app that sends each request to another app until its answer is not 503, or WAITS are over.

    Each wait is drawn between half and all of its length, so that refused requests do not meet again.
    """

    def __init__(self, app: ASGIApp, waits: tuple[float, ...] = WAITS) -> None:
        self._app, self._waits = app, waits
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Anything but HTTP goes to the app as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS") or scope["path"].endswith(_READS)
        turn = contextlib.nullcontext() if reads else self._writing
        body = await _body(receive)
        for wait in self._waits:
            refused = False

            async def pass_on(message: Message) -> None:
                nonlocal refused
                refused = refused or message.get("status") == 503
                if not refused:
                    await send(message)

            try:
                async with turn:  # the app writes into its scope
                    await self._app(
                        {**scope, "state": dict(scope.get("state", {}))}, _replay(body, receive), pass_on
                    )
            except Exception:  # it answers 503 and raises as well, for the server's log
                if not refused:
                    raise
            if not refused:
                return
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        async with turn:
            await self._app(scope, _replay(body, receive), send)


async def _body(receive: Receive) -> list[Message]:
    """All messages of a request's body."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replay(body: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives the body, then what comes after it."""
    left = iter(body)

    async def next_message() -> Message:
        for message in left:
            return message
        return await receive()

    return next_message
