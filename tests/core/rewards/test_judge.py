"""The reward `judge`: what an answer means, what a template may say, and faults of a real HTTP server."""

from __future__ import annotations

import email.utils
import json
import math
import re
import socket
import time
from typing import Any

import pytest

from qrpo_core.config import RewardConfig
from qrpo_core.errors import ConfigError, DataError, EngineError
from qrpo_core.http import retry_after, shown
from qrpo_core.rewards import judge as judge_module
from qrpo_core.rewards.base import RewardRequest, Score, clip
from qrpo_core.rewards.config import JudgeRewardConfig
from qrpo_core.rewards.judge import JudgeReward
from qrpo_core.rewards.registry import reward_identity
from tests.core.rewards.judge_server import Judge, Reply, said

TEMPLATE = "Question: {{ prompt }}\nAnswer: {{ completion }}\nScore {{ lowest }} to {{ highest }}:"


# What is refused before anything is asked.


def judge(url: str = "http://127.0.0.1:9/v1", **settings: Any) -> JudgeReward:
    given = {"model": "j", "template": TEMPLATE, "expected": False, "retry_seconds": 0, **settings}
    return JudgeReward(JudgeRewardConfig(url=url, **given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "{{ completion }} {{ answer }}"},
            "names 'answer', which is not known.*known are prompt",
        ),
        ({"template": "{{ completion"}, r"does not parse .*\[line 1\]"),
        ({"template": "{{ prompt }}"}, "does not show the completion"),
        ({"url": "localhost:8000"}, "is no http address"),
        ({"url": "http://user:pass@host/v1"}, "holds a user or a password: .*key_variable"),
    ],
)
def test_a_section_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(**settings)
    assert re.search(message, str(caught.value))


def test_scales_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="highest 3 is not above"):
        JudgeRewardConfig(url="http://h", model="j", template="x", lowest=3, highest=3)
    for settings, message in [
        ({"max_tokens": 5, "max_completion_tokens": 5}, "one limit under two names"),
        ({"extra_body": {"n": 3}}, "extra_body.n is sent already"),
        ({"pattern": "("}, "is no regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            JudgeRewardConfig(url="http://h", model="j", template="x", **settings)
    with pytest.raises(ValueError, match="a sign is a token of its own"):
        JudgeRewardConfig(url="http://h", model="j", template="x", lowest=-3)


def test_identity_is_the_question_and_not_the_place() -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        section = {"url": "http://a/v1", "model": "j", "template": TEMPLATE, **settings}
        return reward_identity(RewardConfig(kind="judge", judge=section))

    assert identity() == identity(url="http://b/v1", concurrency=3, retry_seconds=1)
    assert identity() != identity(template=TEMPLATE + " ")
    assert identity() != identity(model="k")


# A real server.


TOKENS = [
    {
        "token": "4",
        "logprob": math.log(0.5),
        "top_logprobs": [{"token": name, "logprob": math.log(0.5)} for name in ("4", "5")],
    }
]


def row(text: str, index: int = 0, reference: str | None = None) -> RewardRequest:
    return RewardRequest(f"p{index}", index, (("system", "S"), ("user", "Q?")), text, reference)


def test_what_is_sent() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        made = judge(server.url + "/", system="Be strict.", max_tokens=5, key_variable="NO_SUCH_KEY")
        assert made.score([row("It is 3.")]) == [Score(4.0)]
        _, path, headers, body = server.asked[0]
        assert path == "/v1/chat/completions"
        assert not {"authorization", "Authorization"}.intersection(headers)
        assert body == {
            "model": "j",
            "messages": [
                {"role": "system", "content": "Be strict."},
                {"role": "user", "content": "Question: Q?\nAnswer: It is 3.\nScore 1 to 9:"},
            ],
            "max_tokens": 5,
            "temperature": 0.0,
        }
        judge(server.url, temperature=0.5).score([row("a"), row("a", 1), row("a")])
        seeds = [asked[3]["seed"] for asked in sorted(server.asked[1:], key=lambda a: a[3]["seed"])]
        assert len(set(seeds)) == 2  # a function of the row alone
        made.close()


def test_what_is_sent_to_models_with_other_names_for_their_limits() -> None:
    with Judge(lambda body, turn: said("4", tokens=TOKENS)).running() as server:
        made = judge(
            server.url,
            expected=True,
            max_completion_tokens=900,
            temperature=None,
            top_logprobs=5,
            extra_body={"reasoning_effort": "low"},
        )
        made.score([row("a")])
        body = server.asked[0][3]
        assert body["max_completion_tokens"] == 900
        assert (body["top_logprobs"], body["reasoning_effort"]) == (5, "low")
        assert not {"max_tokens", "temperature"} & body.keys()


def test_template_variables_and_references() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        template += "{{ completion }}|{{ reference.a }}"
        made = judge(server.url, template=template)
        assert made.needs_reference
        made.score([row("C {{ x }}", 0, '{"a": 7}')])
        assert server.asked[0][3]["messages"][0]["content"] == "system=S;user=Q?;C {{ x }}|7"
        (score,) = made.score([row("C", 0, "{}")])  # strict about what is missing inside, too
        assert score.status == "parse_error"
        assert "UndefinedError" in score.detail
        with pytest.raises(DataError, match="no reference"):
            made.score([row("C")])
        hostile = judge(server.url, template="{{ completion }}{{ ''.__class__.__mro__ }}")
        assert hostile.score([row("C")])[0].detail.startswith("SecurityError")
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said("It is good"), "no integer in the answer 'It is good'"),
        (said("12"), "12 is outside the scale 1 to 9"),
        (said("1", finish="length"), "cut"),
        (said("On a scale of 9 I would", finish="length"), "cut"),
        (said("On a scale of 9 I would", finish="MAX_TOKENS"), "cut"),
        (said(None), "empty answer"),
        (said(None, finish="length", reasoning_content="2 faults"), "thinking filled the limit"),
        (said(""), "empty answer"),
        ((200, {}, {"choices": [{"text": "7"}]}), "another form"),
        ((200, {}, {"choices": [{"message": {"role": "assistant"}}]}), "empty answer"),
        (said("x" * 5000), "no integer"),
    ],
)
def test_answers_that_give_no_score(reply: Reply, reason: str) -> None:
    with Judge(lambda body, turn: reply).running() as server:
        (score,) = judge(server.url).score([row("a")])
        assert score.status == "parse_error"
        assert reason in score.detail
        assert len(score.detail) <= 300


@pytest.mark.parametrize(
    "reply",
    [
        said("7", reasoning_content="2 faults, so 6?"),
        said(
            [
                {"type": "thinking", "text": "3"},
                {"type": "text", "text": "Score: "},
                {"type": "text", "text": "7"},
            ]
        ),
        said("Score: 7\nBecause the answer", finish="length"),
    ],
)
def test_answers_in_other_forms(reply: Reply) -> None:
    with Judge(lambda body, turn: reply).running() as server:
        assert judge(server.url).score([row("a")]) == [Score(7.0)]


def test_a_pattern_is_part_of_the_question() -> None:
    with Judge(lambda body, turn: said("2 faults; mark A7 of 8")).running() as server:
        assert judge(server.url).score([row("a")])[0].status == "parse_error"
        assert judge(server.url, pattern=r"A(\d)").score([row("a")]) == [Score(7.0)]


def test_expected_score_over_the_wire() -> None:
    with Judge(lambda body, turn: said("4", tokens=TOKENS)).running() as server:
        assert judge(server.url, expected=True).score([row("a")])[0].reward == pytest.approx(4.5)
        assert server.asked[0][3]["logprobs"] is True
        assert server.asked[0][3]["top_logprobs"] == 20
        assert judge(server.url).score([row("a")])[0].reward == 4.0


def test_a_judge_without_log_probs_is_refused_and_never_mixed() -> None:
    with Judge(lambda body, turn: said("4")).running() as server, pytest.raises(EngineError) as caught:
        judge(server.url, expected=True).score([row("a")])
    assert "expected: false" in str(caught.value)


def completion(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"]).split("Answer: ")[1].split("\n")[0]


def test_order_progress_and_concurrency() -> None:
    def answer(body: dict[str, Any], turn: int) -> Reply:
        time.sleep(0.02)
        return said(completion(body))

    requests = [row(str(1 + i % 9), i) for i in range(40)]
    with Judge(answer).running() as server:
        calls: list[int] = []
        made = judge(server.url, concurrency=8)
        assert [s.reward for s in made.score(requests, calls.append)] == [1 + i % 9 for i in range(40)]
        assert calls == [1] * 40
        assert 4 <= server.most <= 8
        assert made.score([]) == []


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
        assert score == Score(None, "endpoint_error", f"status {status}: busy")
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
        assert "ReadTimeout" in score.detail
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        (score,) = judge(f"http://127.0.0.1:{held.getsockname()[1]}/v1").score([row("a")])
        assert "ConnectError" in score.detail


def test_a_judge_that_is_away_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_FAILED_IN_A_ROW", 4)
    with Judge(lambda body, turn: (503, {}, "away")).running() as server:
        found = judge(server.url, concurrency=2).score([row("a", i) for i in range(6)])
        assert [score.status for score in found] == ["endpoint_error"] * 6
        with pytest.raises(EngineError, match=r"not answered 7 rows in a row .*503: away"):
            judge(server.url, concurrency=2).score([row("a", i) for i in range(60)])
        assert len(server.asked) < 30


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
        assert score == Score(
            None,
            "endpoint_error",
            clip(f"status 403: {json.dumps(error(403, 'no')[2])}; then status 503: away"),
        )


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
        ((200, {}, "<html>login</html>"), 3, "status 200: no JSON object: <html>login</html>"),
        ((200, {}, ""), 3, "status 200: no JSON object:"),
        ((200, {}, {"choices": []}), 3, "status 200: no choices"),
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


def test_closed_it_opens_again() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        made = judge(server.url)
        made.close()
        assert made.score([row("a")]) == [Score(4.0)]
        made.close()
        assert made.score_row(row("a")) == Score(4.0)


def test_shown_urls_have_no_secrets() -> None:
    assert shown("https://u:p@h:1/v1?key=s") == "https://h:1/v1"
    assert shown("http://[") == "an unreadable URL"
