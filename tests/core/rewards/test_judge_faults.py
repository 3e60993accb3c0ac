"""The reward `judge`: faults and refusals of a real HTTP server."""

from __future__ import annotations

import email.utils
import re
import socket
import time
from typing import Any

import pytest

from qrpo_core.common.errors import EngineError
from qrpo_core.common.http import retry_after
from qrpo_core.rewards.base import Score
from qrpo_core.rewards.judge import endpoint as judge_module
from tests.core.rewards.judge_server import Judge, Reply, judge, row, said


def test_faults_that_pass_are_tried_again() -> None:
    faults: list[Reply] = [(429, {"retry-after": "1"}, "slow"), (500, {}, "x"), (0, {}, ""), (503, {}, "x")]
    with Judge(lambda body, turn: faults[turn - 1] if turn <= 4 else said("4")).running() as server:
        started = time.monotonic()
        assert judge(server.url, retry_seconds=60).score([row("a")]) == [Score(4.0)]
        assert len(server.asked) == 5
        assert server.asked[1][0] - started >= 1.0  # Retry-After


@pytest.mark.parametrize("status", [429, 500, 503, 529, 408, 409])
def test_faults_that_stay_are_a_status_of_the_row(status: int) -> None:
    with Judge(lambda body, turn: (status, {}, "busy")).running() as server:
        (score,) = judge(server.url, retry_seconds=1).score([row("a")])
        assert (score.reward, score.status) == (None, "endpoint_error")
        assert re.fullmatch(rf"HTTP {status} .*: busy", score.detail)
        assert 2 <= len(server.asked) <= 4


def test_a_wait_longer_than_the_time_left_is_not_waited() -> None:
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    with Judge(lambda body, turn: (429, {"retry-after": later}, "x")).running() as server:
        started = time.monotonic()
        assert judge(server.url, retry_seconds=30).score([row("a")])[0].status == "endpoint_error"
        assert time.monotonic() - started < 60
        assert len(server.asked) == 1
    assert 3500 < retry_after(later) <= 3600
    assert [retry_after(value) for value in (None, "7", "1.5", "soon", "-1", "\u00b2")] == [
        0,
        7,
        1.5,
        0,
        0,
        0,
    ]


def test_time_outs_and_closed_ports_are_endpoint_errors() -> None:
    def slow(body: dict[str, Any], turn: int) -> Reply:
        time.sleep(1)
        return said("4")

    with Judge(slow).running() as server:
        (score,) = judge(server.url, timeout_seconds=0.1).score([row("a")])
        assert score.status == "endpoint_error"
        assert "no answer within 0.1 s" in score.detail
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        (score,) = judge(f"http://127.0.0.1:{held.getsockname()[1]}/v1").score([row("a")])
        assert "ConnectError" in score.detail


def test_a_judge_that_is_away_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_FAILED_IN_A_ROW", 4)
    with Judge(lambda body, turn: (503, {}, "away")).running() as server:
        found = judge(server.url, concurrency=2).score([row("a", i) for i in range(6)])
        assert [score.status for score in found] == ["endpoint_error"] * 6
        with pytest.raises(EngineError, match=r"not answered 7 rows in a row .*503 .*: away"):
            judge(server.url, concurrency=2).score([row("a", i) for i in range(60)])
        assert len(server.asked) < 30


def test_unanswered_rows_are_counted_over_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_FAILED_IN_A_ROW", 4)
    with Judge(lambda body, turn: (503, {}, "away")).running() as server:
        reward = judge(server.url, concurrency=2)
        for _ in range(2):
            reward.score([row("a", i) for i in range(3)])
        with pytest.raises(EngineError, match="not answered 7 rows in a row"):
            reward.score([row("a", i) for i in range(3)])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_refusals_of_everything_end_the_run_at_once_and_keep_the_key(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")

    def answer(body: dict[str, Any], turn: int) -> Reply:
        return status, {}, {"error": {"message": "bad key very-secret", "code": "x"}}

    with Judge(answer).running() as server:
        with pytest.raises(EngineError) as caught:
            judge(server.url, key_variable="JUDGE_KEY", concurrency=1, retry_seconds=60).score(
                [row("a", i) for i in range(50)]
            )
        assert server.asked[0][2]["Authorization"] == "Bearer very-secret"
        assert len(server.asked) <= 2
        message = str(caught.value)
        assert str(status) in message
        assert server.url in message
        assert caught.value.remedy
        assert "secret" not in message
        assert ("JUDGE_KEY" in message) == (status in (401, 403))


def error(status: int, message: str, code: Any = None) -> Reply:
    return status, {}, {"error": {"message": message, "code": code}}


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (error(400, "This model's maximum context length is 512 tokens", 400), "too_long"),
        (error(400, "too big", "context_length_exceeded"), "too_long"),
        ((400, {}, {"detail": "Input is too long for requested model: 9000 tokens > 8192"}), "too_long"),
        (error(400, "prompt is too long: 210000 tokens > 200000 maximum"), "too_long"),
        (error(422, "The request exceeds the limit of 8192 input tokens"), "too_long"),
        ((413, {}, ""), "too_long"),
        (error(400, "no", "content_filter"), "refused"),
        (error(403, "Your input was flagged by moderation", 403), "refused"),
        (error(400, "The text holds a character that cannot be read"), "refused"),
        (error(422, "unprocessable"), "refused"),
        (error(404, "No endpoints that allow this input"), "refused"),
        (error(200, "flagged", 403), "refused"),
        ((200, {}, {"choices": [], "error": {"type": "invalid_request_error", "message": "x"}}), "refused"),
        (said("I rate it", finish="content_filter"), "refused"),
        (said(None, refusal="I cannot"), "refused"),
        (said("", finish="SAFETY"), "refused"),
    ],
)
def test_a_refusal_of_one_row_is_its_status(reply: Reply, status: str) -> None:
    def answer(body: dict[str, Any], turn: int) -> Reply:
        return reply if "Answer: bad" in body["messages"][-1]["content"] else said("4")

    with Judge(answer).running() as server:
        # Also where it is the first row that is asked: another question shows whose fault it is.
        found = judge(server.url, concurrency=1).score([row("bad"), row("good", 1), row("bad", 2)])
        assert [score.status for score in found] == [status, "ok", status]
        assert found[0].detail


def test_whose_fault_a_refusal_was_may_stay_open() -> None:
    def answer(body: dict[str, Any], turn: int) -> Reply:
        return error(403, "no") if turn == 1 else (503, {}, "away")

    with Judge(answer).running() as server:
        (score,) = judge(server.url).score([row("a")])
        assert score.status == "endpoint_error"
        assert score.detail == "HTTP 403 Forbidden: no; then HTTP 503 Service Unavailable: away"


def choice_error(code: int) -> Reply:
    inside = {
        "message": {"content": ""},
        "finish_reason": "error",
        "error": {"message": "lost", "code": code},
    }
    return 200, {}, {"choices": [inside]}


@pytest.mark.parametrize(
    "reply",
    [
        error(200, "Rate limit exceeded", 429),
        error(200, "Provider overloaded", "502"),
        (200, {}, {"error": "overloaded"}),
        (200, {}, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        (200, {}, {"object": "error", "message": "no worker", "code": 503}),
        (200, {}, {"code": 1302, "msg": "busy", "success": False}),
        (200, {}, {"detail": "busy"}),
        choice_error(502),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": None}),
        (200, {}, "<html>We are back in a moment</html>"),
        (200, {}, ""),
        (502, {}, "<html>Bad gateway</html>"),
        (529, {}, {}),
        (409, {}, {}),
        (429, {"retry-after": "Sat, 28 Nov 2020 00:00:00 GMT"}, {}),
    ],
)
def test_errors_that_pass_are_tried_again_also_inside_an_answer(reply: Reply) -> None:
    with Judge(lambda body, turn: reply if turn == 1 else said("4")).running() as server:
        assert judge(server.url, retry_seconds=60).score([row("a")]) == [Score(4.0)]
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "asked", "told"),
    [
        ((200, {}, "<html>login</html>"), 3, "HTTP 200 OK: no JSON object: <html>login</html>"),
        ((200, {}, ""), 3, "HTTP 200 OK: no JSON object"),
        ((200, {}, {"choices": []}), 3, "HTTP 200 OK: no choices"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), 1, "current quota"),
        (error(200, "You exceeded your current quota", "insufficient_quota"), 1, "current quota"),
        (error(402, "Insufficient credits"), 1, "Insufficient credits"),
    ],
)
def test_what_no_waiting_mends_is_not_waited_for(reply: Reply, asked: int, told: str) -> None:
    with Judge(lambda body, turn: reply).running() as server:
        (score,) = judge(server.url, retry_seconds=600).score([row("a")])
        assert score.status == "endpoint_error"
        assert told in score.detail
        assert len(server.asked) == asked


def test_the_rate_limit_spreads_requests() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        judge(server.url, requests_per_minute=600, concurrency=8).score([row("a", i) for i in range(8)])
        times = [asked[0] for asked in server.asked]
        assert times[-1] - times[0] >= 0.4  # seven gaps of 0.1 s, but for the time on their way


def test_it_can_be_used_after_it_is_closed() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        made = judge(server.url)
        made.close()
        assert made.score([row("a")]) == [Score(4.0)]
        made.close()
        assert made.score_row(row("a")) == Score(4.0)
