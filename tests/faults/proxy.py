"""A proxy between a client and an S3 server that does to requests what networks and servers do.

    with FaultProxy("http://127.0.0.1:8333") as proxy:
        store = StoreConfig(path="s3://bucket/x", endpoint_url=proxy.url, path_style=True)
        proxy.inject(Fault("slow_down", times=3))
        proxy.inject(Fault("cut_answer", method="GET", path="/rows/", after=1000))
        ...
        assert proxy.injected["slow_down"] == 3

It runs in threads of this process, on loopback, and forwards whole requests with their own Host header, so
that signatures stay right. Each request meets at most one fault: the first one injected that matches it and
is not used up. Kinds:

``slow_down``    503 SlowDown; the server does not see the request
``server_error`` 500 InternalError; the server does not see the request
``forbidden``    403 AccessDenied; the server does not see the request
``silence``      no answer until the client gives up; the server does not see the request
``cut_request``  the connection is reset after `after` bytes of the request's body; the server sees nothing
``lost_answer``  the server does what it is asked, and the connection is reset before its answer
``cut_answer``   the connection is reset after the answer's header and `after` bytes of its body
``short_answer`` the same, but closed in good order: nothing but the announced length tells
``hurt_answer``  one bit of the answer's body changes, the first after `after` bytes
``old_listing``  ListObjectsV2 answers as it did at least `seconds` ago (or the first time, if that is later)
"""

from __future__ import annotations

import http.client
import math
import random
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "server_error": (500, "InternalError"),
    "forbidden": (403, "AccessDenied"),
}
_CUTS = ("cut_answer", "short_answer")
_KINDS = (*_ANSWERS, *_CUTS, "silence", "cut_request", "lost_answer", "hurt_answer", "old_listing")


@dataclass
class Fault:
    """What happens to matching requests.

    method, path : of the requests it meets, path as a part of it; empty for any.
    times : how many requests meet it. share : the share of matching requests that do, drawn at random.
    until : end of the fault by `time.monotonic()`. after : bytes that pass before a cut.
    seconds : age of an old listing.
    """

    kind: str
    method: str = ""
    path: str = ""
    times: float = 1
    share: float = 1.0
    until: float = math.inf
    after: int = 0
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(_KINDS)}")


@dataclass
class _Answer:
    """What the server said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    time: float = field(default_factory=time.monotonic)


class FaultProxy:
    """Listens on a free loopback port in front of `upstream`, an http:// URL, until it is closed.

    url : what the client is given as its endpoint. injected : faults met so far, by kind.
    requests : requests so far, by method, those that met a fault included.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._listings: dict[str, list[_Answer]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inject(self, fault: Fault) -> None:
        """Let requests meet a fault from now on."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def close(self) -> None:
        """Stop listening; requests that are waiting are dropped."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def meet(self, method: str, target: str) -> Fault | None:
        """The fault that this request meets, counted."""
        with self._lock:
            self.requests[method] += 1
            for fault in self._faults:
                matches = method.startswith(fault.method) and fault.path in target and fault.times > 0
                if fault.kind == "old_listing":
                    matches = matches and _is_listing(method, target)
                if matches and time.monotonic() < fault.until and self._random.random() < fault.share:
                    fault.times -= 1
                    self.injected[fault.kind] += 1
                    return fault
        return None

    def remember(self, method: str, target: str, answer: _Answer) -> None:
        """Keep every answer to a listing, for when it is to be an old one."""
        if _is_listing(method, target) and answer.status == 200:
            with self._lock:
                self._listings.setdefault(target, []).append(answer)

    def old(self, target: str, seconds: float, answer: _Answer) -> _Answer:
        """The newest answer to this listing that is old enough, else the oldest."""
        with self._lock:
            known = self._listings.get(target) or [answer]
            old = [each for each in known if each.time <= answer.time - seconds]
            return old[-1] if old else known[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is what this is about
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _upstream: http.client.HTTPConnection | None = None

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        proxy = self.server.proxy
        fault = proxy.meet(self.command, self.path)
        kind = fault.kind if fault else ""
        length = int(self.headers.get("Content-Length") or 0)
        if fault and kind == "cut_request":
            self.rfile.read(min(fault.after, length))
            self._reset()
            return
        body = self.rfile.read(length)
        if kind == "silence":
            self._wait()
        elif kind in _ANSWERS:
            self._answer(_refusal(*_ANSWERS[kind]))
        else:
            answer = self._forward(body)
            proxy.remember(self.command, self.path, answer)
            self._pass_on(answer, fault)

    def _pass_on(self, answer: _Answer, fault: Fault | None) -> None:
        """Give the client the server's answer, or what the fault makes of it."""
        if fault is None:
            self._answer(answer)
        elif fault.kind == "old_listing":
            self._answer(self.server.proxy.old(self.path, fault.seconds, answer))
        elif fault.kind == "hurt_answer":
            body = bytearray(answer.body)
            body[fault.after] ^= 1
            self._answer(replace(answer, body=bytes(body)))
        elif fault.kind == "lost_answer":
            self._reset()
        else:
            self._answer(answer, fault.after)
            if fault.kind == "cut_answer":
                self._reset()
            else:
                self._close()

    def _forward(self, body: bytes) -> _Answer:
        for attempt in (1, 2):  # a kept connection may have been closed by the server meanwhile
            if self._upstream is None:
                self._upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
            try:
                self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        self._upstream.putheader(name, value)
                self._upstream.endheaders(body or None)
                response = self._upstream.getresponse()
                return _Answer(response.status, response.getheaders(), response.read())
            except (http.client.HTTPException, OSError):
                self._upstream.close()
                self._upstream = None
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _answer(self, answer: _Answer, limit: int | None = None) -> None:
        """Pass an answer on; with a limit, only so much of its body."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = len(answer.body)
        if self.command == "HEAD":
            length = int(dict(answer.headers).get("Content-Length", 0))
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(answer.body[:limit])

    def _wait(self) -> None:
        while not self.server.proxy.closing.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.05)
            if readable:  # nothing is due: the client has closed
                break
        self._close()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close()

    def _close(self) -> None:
        self.close_connection = True
        for each in (self.rfile, self.wfile, self.connection):
            each.close()

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _is_listing(method: str, target: str) -> bool:
    return method == "GET" and "list-type" in parse_qs(urlsplit(target).query)


def _refusal(status: int, code: str) -> _Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    )
    return _Answer(status, [("Content-Type", "application/xml")], body.encode())
