"""The examples follow the stated rule, whatever order the rows come in."""

from __future__ import annotations

import pyarrow as pa
import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import MESSAGES
from qrpo_core.reporting.html.examples import pick_examples


def _prompts(names, messages=None):
    turns = messages or [[{"role": "user", "content": f"ask {name}"}] for name in names]
    return pa.table({"prompt_id": list(names), "messages": pa.array(turns, MESSAGES)})


def _pick(pair, before, after, prompts=None):
    data = pair(before, after)
    return pick_examples(data.before, data.after, prompts or _prompts(before))


def test_ranks_by_change_of_the_mean(pair):
    before = {f"p{i}": [0.0, 0.0] for i in range(9)}
    after = {f"p{i}": [float(5 - i), float(5 - i)] for i in range(9)}
    found = _pick(pair, before, after)
    assert [(row["label"], row["prompt_id"]) for row in found] == [
        ("largest gain", "p0"),
        ("upper quartile", "p2"),
        ("median", "p4"),
        ("lower quartile", "p6"),
        ("largest loss", "p8"),
    ]
    assert found[0] == {
        "label": "largest gain",
        "prompt_id": "p0",
        "sample_index": 0,
        "prompt": "ask p0",
        "before": "text of p0:0",
        "after": "text of p0:0",
        "reward_before": 0.0,
        "reward_after": 5.0,
        "mean_before": 0.0,
        "mean_after": 5.0,
    }


def test_first_index_with_a_reward_on_both_sides(pair):
    found = _pick(pair, {"a": [None, 0.0, 0.1], "b": [1.0] * 3}, {"a": [0.5, None, 0.6], "b": [1.0] * 3})
    row = next(row for row in found if row["prompt_id"] == "a")
    assert (row["sample_index"], row["reward_before"], row["reward_after"]) == (2, 0.1, 0.6)


def test_labels_do_not_promise_a_gain_or_a_loss(pair):
    worse = _pick(pair, {"a": [1.0], "b": [1.0]}, {"a": [0.5], "b": [0.0]})
    assert [row["label"] for row in worse] == [
        "smallest loss, upper quartile",
        "median, lower quartile, largest loss",
    ]
    better = _pick(pair, {"a": [0.0], "b": [0.0]}, {"a": [0.5], "b": [1.0]})
    assert better[-1]["label"].endswith("smallest gain")
    same = _pick(pair, {"a": [0.0], "b": [0.0]}, {"a": [0.0], "b": [0.0]})
    assert same[0]["label"].startswith("no change")
    assert [row["label"] for row in _pick(pair, {"a": [0.0]}, {"a": [1.0]})] == ["the only prompt"]


def test_prompts_without_a_common_index_are_passed_over(pair):
    found = _pick(pair, {"a": [None, 0.0], "b": [0.0, 0.0]}, {"a": [9.0, None], "b": [1.0, 1.0]})
    assert {row["prompt_id"] for row in found} == {"b"}
    assert _pick(pair, {"a": [None, 0.0]}, {"a": [9.0, None]}) == []


def test_conversations_are_shown_whole(pair):
    turns = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]]
    found = _pick(pair, {"a": [0.0]}, {"a": [1.0]}, _prompts(["a"], turns))
    assert found[0]["prompt"] == "system: Be brief.\n\nuser: Hi"


def test_a_prompt_without_messages_is_refused(pair):
    with pytest.raises(DataError, match="no messages for prompt a"):
        _pick(pair, {"a": [0.0]}, {"a": [1.0]}, _prompts(["b"]))
