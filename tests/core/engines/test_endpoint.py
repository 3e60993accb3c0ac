"""The engine endpoint against a server that fails on purpose. The contract suite has the real server."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.common.http import check_service_url
from qrpo_core.engines.base import LogprobRequest, SampleRequest
from tests.core.engines.endpoint_server import END, PARAMS, REQUESTS, Fault, Server, engine


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


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

    @pytest.mark.parametrize("fault", ["held", "trickled"])
    def test_an_answer_that_takes_too_long(self, server: Server, fault: str) -> None:
        server.faults = [fault]
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
        [
            (400, "vLLM's server does"),
            (401, "MY_KEY"),
            (403, "MY_KEY"),
            (404, "endpoint.model"),
            (301, "url"),
        ],
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
            ({"token_ids": None}, "returns no token ids"),
            ({"logprobs": None}, "no log-probs"),
            ({"logprobs": {"token_logprobs": [-1.0]}}, "2 tokens and 1 log-probs"),
            ({"logprobs": {"token_logprobs": [-1.0, float("nan")]}}, "nan.*prompt p0"),
            ({"token_ids": [5, 6]}, "without an end token.*prompt p0"),
            ({"prompt_token_ids": [0, 1, 2, 0]}, r"read other prompt tokens \(4\) than were sent \(3\)"),
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
            ('{"object": "error", "message": "bad", "code": 400}', 1, "vLLM's server does"),
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
        assert made.logprobs([LogprobRequest((1,), (END,)), LogprobRequest((1,), ())]).tolist() == [-1.0, 0.0]
        with pytest.raises(EngineError, match="scores no given tokens"):
            made.logprobs([LogprobRequest((1,), (3, END))])


@pytest.mark.parametrize("url", [None, "", "host:8000", "ftp://host/v1", "http://"])
def test_a_url_that_is_none(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"endpoint.url"):
        check_service_url(url, "endpoint.url", "MY_KEY")


@pytest.mark.parametrize(
    "url", ["http://me:hidden@host/v1", "ftp://me:hidden@host", "http://host/v1?key=hidden"]
)
def test_secrets_in_the_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        check_service_url(url, "endpoint.url", "MY_KEY")
    assert "hidden" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "hidden\x01")
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        engine(server, key_variable="MY_KEY")
    assert "hidden" not in str(caught.value)


def test_an_interrupt_cancels_the_requests_under_way(server: Server) -> None:
    """Ctrl-C while the server holds its answers back: the call ends, and no thread waits for them."""
    made = engine(server, concurrency=2)
    server.faults = ["held"] * 2
    before = set(threading.enumerate())  # other tests leave idle threads of AnyIO's in this process

    def interrupt() -> None:
        while server.running < 2 and len(server.asked) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        made.sample(REQUESTS, PARAMS)
    sender.join()
    assert len(server.asked) == 2
    deadline = time.monotonic() + 30
    while any("AnyIO" in thread.name for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline  # the event loop's thread ends by itself
        time.sleep(0.01)
    # two remain: the server's own, which still hold their answers
    assert len(set(threading.enumerate()) - before) <= 2


def test_through_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is respected: the request line holds the whole URL."""
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert engine(server, url="http://service.invalid/v1").name == "endpoint/m"
    assert server.paths == ["http://service.invalid/v1/models"]
