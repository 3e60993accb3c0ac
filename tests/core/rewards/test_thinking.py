"""Only what follows the thinking is graded, for every kind of reward."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import KNOWN_MARKS
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.registry import make_reward, reward_identity
from qrpo_core.rewards.thinking import UNFINISHED, answer_after

OPENED = "<|im_start|>assistant\n<think>\n"
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

# completion, what the template wrote before it, the graded part (None: the thinking does not end)
PARTS = [
    ("The answer is 7.", "", "The answer is 7."),
    ("", "", ""),
    ("<think>so 8</think>\n\n7", "", "7"),
    ("<think>a</think>b<think>c</think>d", "", "d"),
    ("<think>quoting </think> here</think>7", "", "7"),
    ("<think>so 7", "", None),
    ("7 <think>or 8?", "", None),
    ("<think>a</think>7 <think>or", "", None),
    ("so 8</think>\n7", OPENED, "7"),
    ("so 8", OPENED, None),
    ("", OPENED, None),
    ("<think>so 8</think>7", OPENED, "7"),
    ("7", EMPTY, "7"),
    ("\n7", EMPTY, "\n7"),
    ("<think>so 8", EMPTY, None),
    ("so 8</think>7", "", "7"),
    ("<|begin_of_thought|>8<|end_of_thought|>7", "", "7"),
    ("\u25c1think\u25b78\u25c1/think\u25b77", "", "7"),
    ("[THINK]8[/THINK]7", "", "7"),
    ("[THINK]8", "", None),
    ("<seed:think>8</seed:think>7", "", "7"),
    ("<think>a [THINK] b</think>7", "", "7"),
    ("</think>", "", ""),
    ("    return 7", "", "    return 7"),
    ("<think>x</think>\n    return 7", "", "    return 7"),
]


@pytest.mark.parametrize(("text", "opening", "part"), PARTS)
def test_the_part_that_is_graded(text: str, opening: str, part: str | None) -> None:
    assert answer_after(text, KNOWN_MARKS, opening) == part


@given(
    thinking=st.text(max_size=40),
    answer=st.text(max_size=40).filter(lambda text: not text.startswith(("\r", "\n"))),
    pair=st.sampled_from(KNOWN_MARKS),
)
def test_whatever_is_thought_does_not_change_the_answer(thinking, answer, pair) -> None:
    whole = f"{pair.open}{thinking}{pair.close}\n{answer}"
    expected = answer_after(answer, KNOWN_MARKS)
    assert answer_after(whole, KNOWN_MARKS) == expected
    assert answer_after(whole.removeprefix(pair.open), KNOWN_MARKS, pair.open) == expected


def score(config: dict, text: str, ground_truth: object = None, opening: str = "") -> Score:
    encoded = None if ground_truth is None else json.dumps(ground_truth)
    request = RewardRequest("p", 0, (("user", "?"),), text, encoded, opening)
    reward = make_reward(RewardConfig(**config))
    (result,) = reward.score([request])
    reward.close()
    return result


WEIGHTED = {"kind": "weighted", "terms": [{"weight": 2, "reward": {"kind": "number"}}]}


@pytest.mark.parametrize("config", [{"kind": "number"}, {"kind": "exact"}, {"kind": "math"}, WEIGHTED])
def test_checked_rewards_grade_the_answer_and_not_the_thinking(config: dict) -> None:
    full = 2.0 if config is WEIGHTED else 1.0
    assert score(config, "<think>8?</think>\n7", 7).reward == full
    assert score(config, "<think>7?</think>\n8", 7).reward == 0
    assert score(config, "<think>7", 7).reward == 0
    assert score(config, "7", 7, OPENED).reward == 0
    assert score(config, "8</think>7", 7, OPENED).reward == full


def test_a_row_whose_thinking_does_not_end_says_so() -> None:
    assert score({"kind": "number"}, "<think>7", 7) == Score(0.0, "ok", UNFINISHED)
    assert score({"kind": "number"}, "<think>7</think>", 7) == Score(0.0)


def test_a_reward_can_be_told_to_see_the_thinking() -> None:
    text = "<think>one two three</think>four"
    assert score({"kind": "length", "max_words": 1}, text).reward == 1
    assert score({"kind": "length", "max_words": 1, "thinking": None}, text).reward == 0


def test_the_terms_of_a_sum_may_see_different_parts() -> None:
    length = {"kind": "length", "max_words": 1}
    terms = [{"weight": 1, "reward": length}, {"weight": 10, "reward": {**length, "thinking": None}}]
    assert score({"kind": "weighted", "terms": terms}, "<think>a b c</think>d").reward == 1


def test_own_marks_as_one_pair_or_a_list() -> None:
    pair = {"open": "<reasoning>", "close": "</reasoning>"}
    for marks in (pair, [pair]):
        config = {"kind": "number", "thinking": marks}
        assert score(config, "<reasoning>8</reasoning>7<think>", 7).reward == 1
        assert RewardConfig(**RewardConfig(**config).model_dump()) == RewardConfig(**config)


def test_the_marks_are_part_of_the_scores_name() -> None:
    configs = [
        RewardConfig(kind="number", thinking=marks)
        for marks in (KNOWN_MARKS, None, [{"open": "<think>", "close": "</think>"}])
    ]
    names = [json.dumps(reward_identity(config), sort_keys=True) for config in configs]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "number", "thinking": []}, "names no marks"),
        ({"kind": "number", "thinking": {"open": "<think>", "close": "<think>"}}, "told apart"),
        ({"kind": "number", "thinking": {"open": "", "close": "</think>"}}, "at least 1 character"),
        ({**WEIGHTED, "thinking": None}, "in each term"),
    ],
)
def test_marks_that_cannot_be_meant_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig(**config)
