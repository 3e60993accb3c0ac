"""Judges: the same completions by another reward, beside the one that training used."""

from __future__ import annotations

import pytest

from qrpo_core.config import EvaluationConfig
from qrpo_core.errors import DataError
from qrpo_core.evaluation.metrics import EvaluationResult, evaluate_policies
from qrpo_core.evaluation.summary import summary_rows

FAST = EvaluationConfig(resamples=200)
BEFORE = {"a": [0.0, 1.0], "b": [0.5, 0.5], "c": [0.0, 0.0]}
AFTER = {"a": [1.0, 1.0], "b": [1.0, 0.5], "c": [1.0, 1.0]}


def test_a_judge_is_compared_like_the_reward_by_hand(pair, side):
    data = pair(BEFORE, AFTER)
    judged = {
        # In another order, and without a score for two rows.
        "strict": (
            side({"c": [None, None], "b": [4.0, 4.0], "a": [2.0, 4.0]}, logprobs=False),
            side({"b": [5.0, 3.0], "a": [1.0, None], "c": [9.0, 9.0]}, logprobs=False),
        )
    }
    result = evaluate_policies(data, FAST, judged)
    strict = result.judges["strict"]
    assert strict.prompts == 2
    assert strict.left_out == {"before": 1, "after": 0, "both": 0}
    assert strict.before.value == pytest.approx((3.0 + 4.0) / 2)
    assert strict.after.value == pytest.approx((1.0 + 4.0) / 2)
    assert strict.difference.value == pytest.approx((-2.0 + 0.0) / 2)
    # a: 1 against 2 and 4, none won; b: 5 and 3 against 4 and 4, half won.
    assert strict.win_rate.value == pytest.approx(0.25)
    assert strict.not_ok_before["parse_error"] == 2
    assert strict.not_ok_after["parse_error"] == 1
    # The reward's own comparison is what it is without judges.
    alone = evaluate_policies(data, FAST).to_dict()
    assert {**result.to_dict(), "judges": {}} == alone
    assert EvaluationResult.from_dict(result.to_dict()) == result
    rows = dict(summary_rows(result))
    assert rows["Judge strict: completions without a score"] == "2 before, 1 after"
    assert rows["Judge strict: mean before → after"].endswith("on 2 prompts")


def test_a_judge_of_other_completions_is_refused(pair, side):
    other = side({"a": [1.0, 1.0], "b": [1.0], "c": [1.0, 1.0]}, logprobs=False)
    with pytest.raises(DataError, match="other completions") as caught:
        evaluate_policies(pair(BEFORE, AFTER), FAST, {"j": (other, side(AFTER, logprobs=False))})
    assert caught.value.where == "evaluation, judge j"


def test_a_judge_without_a_score_for_anything_is_named(pair, side):
    nothing = side({prompt: [None, None] for prompt in BEFORE}, logprobs=False)
    with pytest.raises(DataError, match="none of 3 held-out prompts") as caught:
        evaluate_policies(pair(BEFORE, AFTER), FAST, {"j": (nothing, side(AFTER, logprobs=False))})
    assert caught.value.where == "evaluation, judge j"
