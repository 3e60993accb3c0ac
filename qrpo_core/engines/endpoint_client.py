"""JSON over HTTP with an OpenAI-compatible server: many requests at once, tried again where that can help."""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from qrpo_core.engines.config import EndpointConfig
from qrpo_core.errors import ConfigError, EngineError
from qrpo_core.http import FIRST_WAIT, LONGEST_WAIT, ODD_TRIES, Told, retry_after, told_error

T = TypeVar("T")


def base_url(config: EndpointConfig) -> str:
    """The server's URL without a slash at its end. Raises ConfigError where there is none."""
    try:
        url = httpx.URL((config.url or "").strip().rstrip("/"))
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            f"{config.url!r} is no URL of a server",
            where="endpoint.url",
            remedy="give the base URL of an OpenAI-compatible server, such as http://host:8000/v1",
        )
    if url.userinfo:
        raise ConfigError(
            "the URL holds a name or a password",
            where="endpoint.url",
            remedy=f"put the key into the environment variable {config.key_variable}",
        )
    return str(url)


class Client:
    """Requests to one server. Used as an asynchronous context; made anew for every event loop.

    The key is read from the environment variable `key_variable` and stands in no message.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self.url = base_url(config)
        self._key = os.environ.get(config.key_variable, "").strip()
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(config.timeout_seconds, pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to one request, a JSON object.

        Connection errors, time-outs, 429 and 5xx, also where they stand inside an answer of status 200, are
        tried again with pauses that double, half of each at random, or as long as Retry-After says, for
        `retry_seconds` from the first of them; an answer that is none, `ODD_TRIES` times. Then, and at any
        other answer, EngineError.
        """
        url = f"{self.url}{path}"
        started: float | None = None
        pause, tries, odd = FIRST_WAIT, 0, 0
        while True:
            tries += 1
            wanted = 0.0
            try:
                response = await self._http.request(method, url, json=body)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__} {error}".strip()
            else:
                answer, told = told_error(response)
                if told is None:
                    return answer
                odd += told.odd
                if not told.passes or odd == ODD_TRIES:
                    raise self._refusal(response, told, url)
                trouble = self._told(response, told)
                wanted = retry_after(response.headers.get("retry-after"))
            now = time.monotonic()
            started = now if started is None else started
            wait = max(wanted, pause * random.uniform(0.5, 1.0))
            if now + wait > started + self._config.retry_seconds:
                raise EngineError(
                    f"no answer after {tries} tries: {trouble}"
                    + (f"; it asks to wait {wanted:.0f} s" if wanted else ""),
                    where=url,
                    remedy="see that the server runs and is not overloaded (endpoint.concurrency, "
                    "endpoint.timeout_seconds, endpoint.retry_seconds), then run again",
                )
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_WAIT)

    def _refusal(self, response: httpx.Response, told: Told, url: str) -> EngineError:
        variable = self._config.key_variable
        remedies = {
            400: "the server cannot do what is asked; vLLM's server can",
            402: "see that the account has means left, then run again",
            401: f"set the environment variable {variable} to the server's key",
            403: f"the key in {variable} may not do this" if self._key else f"set {variable} to a key",
            404: "look at endpoint.url (it ends with /v1) and endpoint.model",
        }
        remedy = remedies.get(told.status, "look at endpoint.url")
        return EngineError(self._told(response, told), where=url, remedy=remedy)

    def _told(self, response: httpx.Response, told: Told) -> str:
        """Status and the server's own words, without the key should it repeat it."""
        said: Any = told.text
        if not response.is_success:
            try:
                said = response.json()
                said = said.get("error", said)
                said = said.get("message", said) if isinstance(said, dict) else said
            except (ValueError, AttributeError):
                said = response.text
        text = f"HTTP {response.status_code} {response.reason_phrase}: {said}"
        text = text.replace(self._key, "***") if self._key else text
        return text[:500].strip().rstrip(":")


async def ask_all(
    client: Client,
    count: int,
    concurrency: int,
    ask: Callable[[int], Awaitable[T]],
    progress: Callable[[int], None],
) -> list[T]:
    """`ask(row)` of every row, `concurrency` at a time; the first error ends the others."""
    answers: dict[int, T] = {}
    rows = iter(range(count))

    async def work(rows: Iterable[int]) -> None:
        for row in rows:
            answers[row] = await ask(row)
            progress(1)

    async with client:
        tasks = [asyncio.create_task(work(rows)) for _ in range(min(concurrency, count))]
        try:
            for done in asyncio.as_completed(tasks):
                await done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [answers[row] for row in range(count)]


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of asynchronous work, also where this thread runs an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, work).result()
