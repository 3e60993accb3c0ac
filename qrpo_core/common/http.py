"""A JSON client for HTTP services, with one retry policy for judges and sampling endpoints."""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal

from qrpo_core.common import waits
from qrpo_core.common.errors import ConfigError
from qrpo_core.common.progress import Progress

T = TypeVar("T")

#: Retryable statuses besides 5xx. 0: no response (connection error, time-out).
_RETRYABLE = frozenset({0, 408, 409, 425, 429})
#: Error names that mean an empty account, whatever their status.
_OUT_OF_FUNDS = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
#: Error names of services that send no status, mostly inside a response of status 200.
_NAMED = {
    400: ("invalid_request_error", "badrequesterror", "context_length_exceeded", "content_filter"),
    401: ("authentication_error", "invalid_api_key", "unauthorized"),
    402: tuple(_OUT_OF_FUNDS),
    403: ("permission_error", "permission_denied", "forbidden"),
    404: ("not_found_error", "notfounderror", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
_STATUS_OF = {name: status for status, names in _NAMED.items() for name in names}
#: Tries of a request whose responses have status 200 and no usable content (a web page, no choices).
_MALFORMED_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_EXCERPT = 300


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request has no usable answer.

    status : HTTP status, or the status that an error inside a response of status 200 stands for (500 if it
        names none); 200 for a malformed response, 0 for no response.
    code : the service's name of the error, or "".
    message : for people; may quote the key.
    body : the response's text.
    retry_after : seconds that the service asks to wait.
    """

    status: int
    code: str
    message: str
    body: str = ""
    retry_after: float = 0.0

    @property
    def malformed(self) -> bool:
        """Whether the response reports no error and has no usable content either."""
        return self.status == 200

    @property
    def out_of_funds(self) -> bool:
        """Whether the account is empty: retries do not help, and the request is not to blame."""
        return self.status == 402 or self.code in _OUT_OF_FUNDS

    @property
    def retryable(self) -> bool:
        """Whether another try may succeed."""
        return self.malformed or self.status in _RETRYABLE or self.status >= 500


class ServiceError(Exception):
    """A request without a usable answer. The message is one line and never holds the key."""

    def __init__(self, message: str, fault: Fault, tries: int) -> None:
        super().__init__(message)
        self.status, self.code, self.body = fault.status, fault.code, fault.body
        self.tries = tries


class Refused(ServiceError):
    """The service refused the request; another try would not succeed."""


class Unavailable(ServiceError):
    """The service gave no answer within the retry time, or the account is empty."""


class RateLimit:
    """Spreads requests evenly over time, across threads and event loops. per_minute : None is no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    async def wait(self) -> None:
        """Wait until the next request may start."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval
        await asyncio.sleep(start - now)


class JsonClient:
    """Sends JSON requests to one service, many at a time. Make a new one for each `map`.

    Parameters
    ----------
    url : base URL (see `check_service_url`).
    key_variable : environment variable with a bearer key; no Authorization header if it is not set.
    timeout : longest time of one try, seconds.
    retry_seconds : how long a request is retried after its first failure. Connection errors, time-outs, 408,
        409, 425, 429 and 5xx are retried, also where they stand inside a response of status 200. Pauses start
        at 0.5 s, double up to 30 s, have half of jitter, and are at least as long as Retry-After asks.
        Malformed responses are tried 3 times. Redirects are refused.
    concurrency : requests at a time.
    rate_limit : applies to every try.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str,
        timeout: float,
        retry_seconds: float,
        concurrency: int,
        rate_limit: RateLimit | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout, self._retry_seconds = timeout, retry_seconds
        self._concurrency, self._rate_limit = concurrency, rate_limit
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"the key in the variable {key_variable} has characters that a header cannot hold",
                remedy="set it to the key alone",
            )
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=None,  # `_try` limits the whole try, which httpx does not
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def map(self, ask: Callable[[int], Awaitable[T]], count: int, progress: Progress) -> list[T]:
        """Return [ask(0), ..., ask(count - 1)], `concurrency` at a time; calls `progress(1)` after each.

        The requests run in an event loop in another thread, so this also works where an event loop runs
        already. The first error, or an interrupt, cancels the requests under way.
        """
        finished: SimpleQueue[int] = SimpleQueue()
        with start_blocking_portal() as portal:
            answers = portal.start_task_soon(self._map, ask, count, finished)
            answers.add_done_callback(lambda _: finished.put(0))
            while rows := waits.get(finished):
                progress(rows)
            return answers.result()

    async def _map(
        self, ask: Callable[[int], Awaitable[T]], count: int, finished: SimpleQueue[int]
    ) -> list[T]:
        answers: dict[int, T] = {}
        rows = iter(range(count))

        async def work() -> None:
            for row in rows:
                answers[row] = await ask(row)
                finished.put(1)

        async with self._http:
            tasks = [asyncio.create_task(work()) for _ in range(min(self._concurrency, count))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [answers[row] for row in range(count)]

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the service answers. Raises Refused or Unavailable."""
        deadline: float | None = None
        pause, tries, malformed = _FIRST_PAUSE, 0, 0
        while True:
            if self._rate_limit is not None:
                await self._rate_limit.wait()
            tries += 1
            answer = await self._try(method, f"{self.url}/{path}", body)
            if not isinstance(answer, Fault):
                return answer
            message = self._one_line(answer.message)
            if not answer.retryable and not answer.out_of_funds:
                raise Refused(message, answer, tries)
            malformed += answer.malformed
            now = time.monotonic()
            deadline = now + self._retry_seconds if deadline is None else deadline
            wait = max(answer.retry_after, pause * random.uniform(0.5, 1.0))
            if answer.out_of_funds or malformed == _MALFORMED_TRIES or now + wait > deadline:
                asks = f"; it asks to wait {answer.retry_after:.0f} s" if answer.retry_after else ""
                raise Unavailable(message + asks, answer, tries)
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _try(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any] | Fault:
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._http.request(method, url, json=body)
        except TimeoutError:
            return Fault(0, "", f"no answer within {self._timeout:g} s")
        except httpx.RequestError as error:
            return Fault(0, "", f"{type(error).__name__} {error}".strip())
        return _read_response(response)

    def _one_line(self, text: str) -> str:
        """One short line without the key, which some services quote."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_EXCERPT].rstrip(" :")


def check_service_url(url: str | None, field: str, key_variable: str) -> str:
    """The base URL without a slash at its end. Raises ConfigError, naming `field`, if it is not usable.

    A URL that may hold a secret (user, password, query) is refused and not shown.
    """
    given = (url or "").strip().rstrip("/")
    if "@" in given or "?" in given:
        raise ConfigError(
            "the URL holds a user, a password or a query",
            where=field,
            remedy=f"give the base URL alone, and the key in the environment variable {key_variable}",
        )
    try:
        parsed = httpx.URL(given)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"{url!r} is not the URL of a service",
            where=field,
            remedy="give the base URL of an OpenAI-compatible service, such as http://host:8000/v1",
        )
    return str(parsed)


def _read_response(response: httpx.Response) -> dict[str, Any] | Fault:
    """The JSON object of a response, or its fault.

    Gateways send status 200 with {"error": ...}, with an error inside the only choice, without choices, or
    with a web page.
    """
    try:
        value = response.json()
    except (ValueError, RecursionError):
        value = None
    body = value if isinstance(value, dict) else {}
    error = body.get("error")
    if not response.is_success:
        return _fault(response, response.status_code, error or body)
    match body.get("choices"):
        case [{"error": inside}, *_] if inside:
            error = error or inside
        case [{"finish_reason": "error"}, *_]:
            error = error or "the choice ended with an error"
    has_message = any(isinstance(body.get(key), str) for key in ("detail", "message", "msg"))
    if not error and (
        "error" in (body.get("object"), body.get("type")) or (has_message and "choices" not in body)
    ):
        error = body
    if error:
        return _fault(response, _status_of(error), error)
    if not isinstance(value, dict):
        return _fault(response, 200, "", "no JSON object: ")
    if body.get("choices", True) in ([], None):
        return _fault(response, 200, "", "no choices: ")
    return body


def _fault(response: httpx.Response, status: int, error: Any, what: str = "") -> Fault:
    """The fault of a response. error : what the body reports, if anything; what : goes before it."""
    fields = error if isinstance(error, dict) else {"message": error}
    text = fields.get("message")
    text = text if isinstance(text, str) and text else response.text
    return Fault(
        status,
        str(fields.get("code") or fields.get("type") or ""),
        f"HTTP {response.status_code} {response.reason_phrase}: {what}{text}",
        response.text,
        retry_after(response.headers.get("retry-after")),
    )


def _status_of(error: Any) -> int:
    """The status that an error in a body stands for; 500, which is retried, if it names none."""
    if not isinstance(error, dict):
        return 500
    for key in ("code", "status", "status_code", "type"):
        name = error.get(key)
        if isinstance(name, int | str) and str(name).isascii() and str(name).isdigit():
            if 400 <= int(name) < 600:
                return int(name)
        elif str(name).lower() in _STATUS_OF:
            return _STATUS_OF[str(name).lower()]
    return 500


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 if it cannot be read."""
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
