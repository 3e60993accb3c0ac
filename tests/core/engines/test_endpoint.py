"""The engine endpoint against a server that fails on purpose. The contract suite has the real server."""

from __future__ import annotations

import asyncio
import email.utils
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest

from qrpo_core.engines.base import SampleRequest, SamplingParams, ScoreRequest
from qrpo_core.engines.config import EndpointConfig
from qrpo_core.engines.endpoint import EndpointEngine
from qrpo_core.engines.endpoint_client import base_url
from qrpo_core.errors import ConfigError, EngineError

END = 7
PARAMS = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=4, stop_token_ids=(END, 8))
REQUESTS = [SampleRequest(f"p{row}", 0, (1, 2, row), 2**63 + row) for row in range(12)]

#: What happens to a request: a status, headers and a body; "reset", "held"; None for a right answer.
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
        assert self.path == "/v1/models"
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

    def answer(self, status: int, headers: dict[str, str], text: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def engine(server: Server, **settings: Any) -> EndpointEngine:
    settings = {"url": server.url, "retry_seconds": 20.0, **settings}
    return EndpointEngine(EndpointConfig(**settings), vocab_size=20, max_length=100)


def test_what_is_asked(server: Server) -> None:
    steps: list[int] = []
    made = engine(server, concurrency=3)
    server.seconds = 0.02
    drawn = made.sample(REQUESTS, PARAMS, steps.append)
    assert made.name == "endpoint/m"
    assert [(c.prompt_id, c.seed, c.token_ids) for c in drawn] == [
        (r.prompt_id, r.seed, (5, END)) for r in REQUESTS
    ]
    assert {c.logprob for c in drawn} == {-1.75}
    assert steps == [1] * 12
    assert server.most == 3
    assert sorted(body["seed"] for body in server.asked) == list(range(12))  # signed numbers are taken
    body = next(body for body in server.asked if body["prompt"] == [1, 2, 4])
    told = {"model": "m", "temperature": 0.8, "top_p": 0.9, "max_tokens": 4, "stop_token_ids": [END, 8]}
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "n": 1, "seed": 4}
    assert body | told | plain == body


def test_also_within_an_event_loop(server: Server) -> None:
    made = engine(server)

    async def inside() -> int:
        return len(made.sample(REQUESTS[:2], PARAMS))

    assert asyncio.run(inside()) == 2


class TestTriedAgain:
    @pytest.mark.parametrize(
        "fault",
        [
            *[
                (503, {}, "busy"),
                (429, {}, "many"),
                (500, {}, ""),
                (502, {}, "<html>"),
                (409, {}, ""),
                "reset",
            ],
            (200, {}, '{"error": {"message": "overloaded", "code": 502}}'),
            (200, {}, '{"error": "overloaded"}'),
            (200, {}, '{"choices": [{"error": {"message": "lost"}, "finish_reason": "error"}]}'),
            (200, {}, "<html>We are back in a moment</html>"),
            (200, {}, '{"choices": []}'),
        ],
    )
    def test_errors_that_pass(self, server: Server, fault: Fault) -> None:
        server.faults = [fault, fault]
        assert len(engine(server).sample(REQUESTS[:2], PARAMS)) == 2
        assert len(server.asked) == 4

    def test_an_answer_that_takes_too_long(self, server: Server) -> None:
        server.faults = ["held"]
        assert len(engine(server, timeout_seconds=2).sample(REQUESTS[:1], PARAMS)) == 1
        assert len(server.asked) == 2

    @pytest.mark.parametrize("dated", [False, True])
    def test_as_late_as_the_server_says(self, server: Server, dated: bool) -> None:
        later = email.utils.formatdate(time.time() + 3, usegmt=True) if dated else "2"
        server.faults = [(429, {"Retry-After": later}, "")]
        started = time.monotonic()
        engine(server).sample(REQUESTS[:1], PARAMS)
        assert time.monotonic() - started > 1.9

    def test_not_for_ever(self, server: Server) -> None:
        server.faults = [(503, {}, '{"error": {"message": "loading the weights"}}')] * 100
        with pytest.raises(EngineError, match=r"no answer after \d tries: HTTP 503.*loading the weights"):
            engine(server, retry_seconds=1.5).sample(REQUESTS[:1], PARAMS)
        assert 2 <= len(server.asked) <= 4

    def test_not_where_it_is_to_wait_too_long(self, server: Server) -> None:
        server.faults = [(429, {"Retry-After": "3600"}, "")]
        started = time.monotonic()
        with pytest.raises(EngineError, match="asks to wait 3600 s"):
            engine(server).sample(REQUESTS[:1], PARAMS)
        assert time.monotonic() - started < 60

    def test_a_server_that_is_not_there(self, server: Server) -> None:
        with pytest.raises(EngineError, match=r"no answer.*ConnectError.*:9/v1/models"):
            engine(server, url="http://127.0.0.1:9/v1", retry_seconds=0)


class TestRefused:
    @pytest.mark.parametrize(
        ("status", "remedy"),
        [(400, "vLLM's server can"), (401, "MY_KEY"), (403, "MY_KEY"), (404, "endpoint.model"), (301, "url")],
    )
    def test_at_once_in_one_line_without_the_key(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, remedy: str
    ) -> None:
        monkeypatch.setenv("MY_KEY", "sk-very-secret\n")
        server.faults = [(status, {}, json.dumps({"error": {"message": "no to\nsk-very-secret"}}))] * 100
        with pytest.raises(EngineError) as caught:
            engine(server, key_variable="MY_KEY", concurrency=1).sample(REQUESTS, PARAMS)
        assert server.keys == {"Bearer sk-very-secret"}
        assert len(server.asked) == 1
        line = str(caught.value)
        assert f"HTTP {status}" in line
        assert "no to ***" in line
        assert remedy in line
        assert server.url in line
        assert "sk-very-secret" not in line + repr(caught.value)

    def test_the_first_error_ends_the_other_requests(self, server: Server) -> None:
        server.faults = [(400, {}, "no"), *["held"] * 30]
        started = time.monotonic()
        with pytest.raises(EngineError, match="HTTP 400"):
            engine(server, concurrency=4).sample(REQUESTS, PARAMS)
        assert time.monotonic() - started < 30  # nobody waits for the answers of the others
        assert len(server.asked) <= 4

    @pytest.mark.parametrize(
        ("models", "wanted", "message"),
        [
            ([{"id": "a"}, {"id": "b"}], None, "it serves 2 models.*'a', 'b'"),
            ([{"id": "a"}], "b", "endpoint.model is 'b'.*'a'"),
            ([], None, "it serves 0 models"),
        ],
    )
    def test_models(
        self, server: Server, models: list[dict[str, Any]], wanted: str | None, message: str
    ) -> None:
        server.models = models
        with pytest.raises(EngineError, match=message):
            engine(server, model=wanted)

    def test_one_of_several_models(self, server: Server) -> None:
        server.models = [{"id": "a"}, {"id": "b"}]
        assert engine(server, model="b").name == "endpoint/b"

    def test_the_servers_limit_counts(self, server: Server) -> None:
        long = SampleRequest("long-one", 0, (1,) * 13, 1)
        with pytest.raises(EngineError, match=r"13 tokens.*16.*long-one"):
            engine(server).sample([long], PARAMS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"token_ids": None}, "no token ids"),
            ({"logprobs": None}, "no log-probs"),
            ({"logprobs": {"token_logprobs": [-1.0]}}, "2 tokens and 1 log-probs"),
            ({"logprobs": {"token_logprobs": [-1.0, float("nan")]}}, "nan.*prompt p0"),
            ({"token_ids": [5, 6]}, "without an end token.*prompt p0"),
            ({"prompt_token_ids": [0, 1, 2, 0]}, "read 4 prompt tokens where 3 were sent"),
        ],
    )
    def test_answers_that_are_not_what_was_asked(
        self, server: Server, change: dict[str, Any], message: str
    ) -> None:
        server.change = lambda choice: choice.update(change)
        with pytest.raises(EngineError, match=message):
            engine(server).sample(REQUESTS[:1], PARAMS)

    @pytest.mark.parametrize(
        ("text", "asked", "told"),
        [
            ("<html>", 3, "HTTP 200 OK: no JSON object: <html>"),
            ("[1]", 3, "no JSON object"),
            ('{"choices": []}', 3, "no choices"),
            ("{}", 1, "no completion in the answer"),
            ('{"error": {"message": "no such model", "type": "model_not_found"}}', 1, "endpoint.model"),
            ('{"object": "error", "message": "bad", "code": 400}', 1, "vLLM's server can"),
        ],
    )
    def test_answers_that_are_none(self, server: Server, text: str, asked: int, told: str) -> None:
        server.faults = [(200, {}, text)] * 9
        with pytest.raises(EngineError, match=told) as caught:
            engine(server).sample(REQUESTS[:1], PARAMS)
        assert server.url in str(caught.value)
        assert len(server.asked) == asked

    def test_a_server_that_scores_nothing(self, server: Server) -> None:
        server.change = lambda choice: choice.update(
            {"token_ids": [END], "logprobs": {"token_logprobs": [-1.0]}}
        )
        made = engine(server)
        assert made.logprobs([ScoreRequest((1,), (END,)), ScoreRequest((1,), ())]).tolist() == [-1.0, 0.0]
        with pytest.raises(EngineError, match="scores no given tokens"):
            made.logprobs([ScoreRequest((1,), (3, END))])


@pytest.mark.parametrize("url", [None, "", "host:8000", "ftp://host/v1", "http://"])
def test_a_url_that_is_none(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"endpoint.url"):
        base_url(EndpointConfig(url=url))


def test_a_password_in_the_url_is_refused_and_not_told() -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        base_url(EndpointConfig(url="http://me:hidden@host/v1"))
    assert "hidden" not in str(caught.value)
