"""A small JSON client of an HTTP service: errors that pass are tried again, others are told at once."""

from __future__ import annotations

import email.utils
import os
import random
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

import httpx

#: What may pass: too early, too many requests, a conflict, and failures of the server (500 and above).
#: 408: it waited too long for us.
_PASSING = frozenset({408, 409, 425, 429})
#: Names of errors that no waiting mends, whatever their status: the money is spent.
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
#: What services name their errors where they give no status, in a body of status 200 above all.
_NAMED = {
    400: ("invalid_request_error", "badrequesterror", "context_length_exceeded", "content_filter"),
    401: ("authentication_error", "invalid_api_key", "unauthorized"),
    402: tuple(_SPENT),
    403: ("permission_error", "permission_denied", "forbidden"),
    404: ("not_found_error", "notfounderror", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
_STATUS_OF = {name: status for status, names in _NAMED.items() for name in names}
#: How often an answer is asked for that comes with status 200 and is none: a page, nothing, no choice.
ODD_TRIES = 3
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
_EXCERPT = 300


@dataclass(frozen=True, slots=True)
class Told:
    """An error as a service tells it, by its status or inside an answer of status 200.

    status : the HTTP status, or the one that the body names; 500 for an error without one; 200 for an
        answer that is none.
    code : the service's own name of the error, or "".
    text : its words.
    """

    status: int
    code: str
    text: str

    @property
    def odd(self) -> bool:
        """Whether it is no error but an answer that is none."""
        return self.status == 200

    @property
    def passes(self) -> bool:
        """Whether another try may be answered."""
        return (self.odd or self.status in _PASSING or self.status >= 500) and not self.spent

    @property
    def spent(self) -> bool:
        """Whether the account has no means left: no try will be answered, and no row is at fault."""
        return self.status == 402 or self.code in _SPENT


def told_error(response: httpx.Response) -> tuple[dict[str, Any], Told | None]:
    """The JSON object of a response (empty where it is none), and the error that it is or holds.

    Gateways answer with status 200 and {"error": ...}, with an error inside the only choice, with no
    choice, or with a page.
    """
    try:
        value = response.json()
    except (ValueError, RecursionError):
        value = None
    body = value if isinstance(value, dict) else {}
    error = body.get("error")
    if not response.is_success:
        return body, Told(response.status_code, _code(error if error else body), response.text)
    match body.get("choices"):
        case [{"error": inside}, *_] if inside:
            error = error or inside
        case [{"finish_reason": "error"}, *_]:
            error = error or "the choice ended with an error"
    says = any(isinstance(body.get(key), str) for key in ("detail", "message", "msg"))
    if not error and ("error" in (body.get("object"), body.get("type")) or (says and "choices" not in body)):
        error = body
    if error:
        return body, Told(_status(error), _code(error), f"inside an answer: {response.text}")
    if not isinstance(value, dict):
        return body, Told(200, "", f"no JSON object: {response.text}")
    if body.get("choices", True) in ([], None):
        return body, Told(200, "", f"no choices: {response.text}")
    return body, None


def _code(error: Any) -> str:
    names = [error.get(key) for key in ("code", "type")] if isinstance(error, dict) else []
    return str(next((name for name in names if name), ""))


def _status(error: Any) -> int:
    """The status that an error in a body stands for; 500 where it names none, so that it is tried again."""
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


class Refused(Exception):
    """The service answered with an error that will not pass.

    status : the HTTP status, or the one that stands in the body; 0 where the URL is none.
    code : the service's own name of the error, or "".
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Unavailable(Exception):
    """No answer within the time that a request goes on trying; the message is the last reason.

    Also where no try can help for now (the account has no means left).
    """


class Stopped(Exception):
    """`Client.stop` was called while a request waited."""


class Client:
    """Posts JSON, from any number of threads.

    Parameters
    ----------
    url : base URL.
    key_variable : environment variable with a bearer key, read now; no header where it is not set.
    timeout : longest time of one request, seconds.
    retry_seconds : longest time that a request goes on trying against connection errors, time-outs, 408,
        409, 425, 429 and 5xx, as a status or inside an answer of status 200. It waits 0.5 s, doubled each
        time up to 30 s, with half of jitter, and at least what the server's Retry-After says. An answer of
        status 200 that is none is asked for `ODD_TRIES` times.
    per_minute : requests that may start in a minute, tries included, evenly spread; None: any number.
    connections : requests at a time.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str,
        timeout: float,
        retry_seconds: float,
        per_minute: int | None = None,
        connections: int = 1,
    ) -> None:
        self._url = url.rstrip("/")
        self._key = os.environ.get(key_variable, "")
        self._retry_seconds = retry_seconds
        self._stop = threading.Event()
        self._gate, self._interval, self._next = threading.Lock(), 60 / per_minute if per_minute else 0.0, 0.0
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, pool=None),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The service's JSON object. Raises Refused, Unavailable or Stopped."""
        started, wait, odd = time.monotonic(), FIRST_WAIT, 0
        while True:
            self._take_turn()
            asked = 0.0
            try:
                response = self._client.post(f"{self._url}/{path}", json=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise Refused(0, "invalid_url", self._safe(str(error))) from None
            except httpx.RequestError as error:
                reason = self._safe(f"{type(error).__name__}: {error}")
            else:
                value, told = told_error(response)
                if told is None:
                    return value
                reason = f"status {response.status_code}: {self._safe(told.text)}"
                odd += told.odd
                if told.spent or odd == ODD_TRIES:
                    raise Unavailable(reason)
                if not told.passes:
                    raise Refused(told.status, told.code, self._safe(told.text))
                asked = retry_after(response.headers.get("retry-after"))
            pause = max(asked, wait * random.uniform(0.5, 1.0))
            if time.monotonic() - started + pause > self._retry_seconds:
                raise Unavailable(reason)
            self._wait(pause)
            wait = min(LONGEST_WAIT, 2 * wait)

    def stop(self) -> None:
        """Make requests that wait give up (`Stopped`); those under way come to their end."""
        self._stop.set()

    def close(self) -> None:
        """Close the connections."""
        self.stop()
        self._client.close()

    def _take_turn(self) -> None:
        if self._stop.is_set():
            raise Stopped
        if not self._interval:
            return
        with self._gate:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        self._wait(turn - now)

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _safe(self, text: str) -> str:
        """One short line in which the key does not stand: some services quote it."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_EXCERPT]


def shown(url: str) -> str:
    """A URL without user, password and query, for messages."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "an unreadable URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number or a date); 0 without one that can be read."""
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
