"""A server of completions that fails on purpose, and the engine that asks it."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

from qrpo_core.config.engines import EndpointConfig
from qrpo_core.engines.base import SampleRequest, SamplingParams
from qrpo_core.engines.endpoint import EndpointEngine

END = 7
PARAMS = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=4, stop_token_ids=(END, 8))
REQUESTS = [SampleRequest(f"p{row}", 0, (1, 2, row), 2**63 + row) for row in range(12)]

#: What happens to a request: a status, headers and a body; "reset", "held", "trickled"; None for an answer.
Fault = tuple[int, dict[str, str], str] | str | None


class Server(ThreadingHTTPServer):
    """A served model `m` that ends every completion at once, and the faults of the next requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: list[dict[str, Any]] = [{"id": "m", "max_model_len": 16}]
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.paths: list[str] = []
        self.running, self.most = 0, 0
        self.seconds = 0.0
        self.change: Callable[[dict[str, Any]], None] = lambda choice: None
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        assert self.path.endswith("/v1/models")
        self.answer(200, {}, json.dumps({"data": self.server.models}))

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.keys.add(self.headers["Authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.seconds)
        with server.lock:
            server.running -= 1
        if fault == "held":
            server.released.wait(60)
        elif fault == "trickled":
            self.trickle()
            return
        elif fault == "reset":
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, tuple):
            self.answer(*fault)
            return
        choice = {"token_ids": [5, END], "logprobs": {"token_logprobs": [-1.5, -0.25]}}
        server.change(choice)
        self.answer(200, {}, json.dumps({"choices": [choice]}))

    def trickle(self) -> None:
        """Send spaces before the body, as some services do while a request waits in their queue."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")

    def answer(self, status: int, headers: dict[str, str], text: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has given up
            self.wfile.write(text.encode())


def engine(server: Server, **settings: Any) -> EndpointEngine:
    settings = {"url": server.url, "retry_seconds": 20.0, **settings}
    return EndpointEngine(EndpointConfig(**settings), vocab_size=20, max_length=100)
