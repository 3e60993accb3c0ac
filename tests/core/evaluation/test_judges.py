"""Judges: the same completions by another reward, beside the one that training used."""

from __future__ import annotations

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.metrics import evaluate_policies
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.reporting.summary import summary_rows

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


@pytest.mark.parametrize("silent", ["before", "after"])
def test_a_judge_without_a_score_on_both_sides_is_counted_and_the_rest_goes_on(pair, side, silent):
    nothing = side({prompt: [None, None] for prompt in BEFORE}, logprobs=False)
    sides = (
        (nothing, side(AFTER, logprobs=False))
        if silent == "before"
        else (side(BEFORE, logprobs=False), nothing)
    )
    other = side(BEFORE, logprobs=False), side(AFTER, logprobs=False)
    data = pair(BEFORE, AFTER)
    result = evaluate_policies(data, FAST, {"j": sides, "other": other})
    assert set(result.judges) == {"other"}
    assert result.silent_judges["j"]["parse_error"] == (6 if silent == "after" else 0)
    assert result.judges == evaluate_policies(data, FAST, {"other": other}).judges
    assert EvaluationResult.from_dict(result.to_dict()) == result
    old = result.to_dict()
    del old["silent_judges"]  # as results from before this field are stored
    assert EvaluationResult.from_dict(old).silent_judges == {}
