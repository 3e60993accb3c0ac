"""The reward `judge`: its config, its requests and its answers, over a real HTTP server."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError, EngineError
from qrpo_core.config import RewardConfig
from qrpo_core.config.judge_rewards import JudgeRewardConfig
from qrpo_core.rewards.base import Score
from qrpo_core.rewards.registry import reward_identity
from tests.core.rewards.judge_server import TEMPLATE, TOKENS, Judge, Reply, completion, judge, row, said

# What is refused before anything is asked.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "{{ completion }} {{ answer }}"},
            "names the unknown variable 'answer'.*use prompt",
        ),
        ({"template": "{{ completion"}, r"does not parse .*\[line 1\]"),
        ({"template": "{{ prompt }}"}, "does not show the completion"),
        ({"url": "localhost:8000"}, "is not the URL of a service"),
        ({"url": "http://user:pass@host/v1"}, "holds a user, a password.*OPENAI_API_KEY"),
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


def test_template_variables_and_ground_truths() -> None:
    with Judge(lambda body, turn: said("4")).running() as server:
        template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        template += "{{ completion }}|{{ ground_truth.a }}"
        made = judge(server.url, template=template)
        assert made.needs_ground_truth
        made.score([row("C {{ x }}", 0, '{"a": 7}')])
        assert server.asked[0][3]["messages"][0]["content"] == "system=S;user=Q?;C {{ x }}|7"
        (score,) = made.score([row("C", 0, "{}")])  # strict about what is missing inside, too
        assert score.status == "parse_error"
        assert "UndefinedError" in score.detail
        with pytest.raises(DataError, match="no ground truth"):
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
