"""A small JSON client of an HTTP service: errors that pass are tried again, others are told at once."""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
import urllib.parse
from typing import Any

import httpx

#: What may pass: too early, too many requests, and failures of the server. 408: it waited too long for us.
PASSING = frozenset({408, 425, 429})
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
_EXCERPT = 300


class Refused(Exception):
    """The service answered with a status that will not pass.

    status : the HTTP status; 2xx where the body is not a JSON object, 0 where the URL is none.
    code : the service's own name of the error, or "".
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Unavailable(Exception):
    """No answer within the time that a request goes on trying; the message is the last reason."""


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
        425, 429 and 5xx. It waits 0.5 s, doubled each time up to 30 s, with half of jitter, and at least
        what the server's Retry-After says.
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
        started, wait = time.monotonic(), FIRST_WAIT
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
                if response.status_code not in PASSING and response.status_code < 500:
                    return self._read(response)
                reason = f"status {response.status_code}: {self._safe(response.text)}"
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

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            value = response.json()
        except ValueError:
            value = None
        if response.is_success and isinstance(value, dict):
            return value
        error = value.get("error", value) if isinstance(value, dict) else None
        code = error.get("code") or error.get("type") if isinstance(error, dict) else None
        raise Refused(response.status_code, str(code or ""), self._safe(response.text))

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
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
