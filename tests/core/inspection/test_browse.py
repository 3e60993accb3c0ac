"""`qrpo browse`: what is chosen, in which order, counted, and safe to print."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import QRPOError
from qrpo_core.inspection.browse import Choice, Found, Span, _first, browse, browse_lines
from tests.core.small_experiment import changed, precompute
from tests.core.stores import REWARD

ROW: dict[str, Any] = {
    "source": "references",
    "prompt_id": "0123456789",
    "split": "train",
    "messages": [{"role": "user", "content": "What is six times seven?"}],
    "ground_truth": None,
    "sample_index": 2,
    "text": "It is 42.",
    "finish_reason": "stop",
    "num_tokens": 7,
    "reward": 0.5,
    "status": "ok",
    "detail": "",
    "quantile": 0.25,
}


def test_choosing_by_each_thing() -> None:
    takes = [
        Choice(),
        Choice(status="ok", reward=Span(0.5, 0.5), quantile=Span(0, 0.25)),
        Choice(search="42"),
        Choice(search="SIX times"),
    ]
    leaves = [
        Choice(status="timeout"),
        Choice(status="unscored"),
        Choice(reward=Span(0.6)),
        Choice(quantile=Span(0.3, 1)),
        Choice(search="43"),
    ]
    assert [choice.takes(ROW) for choice in takes] == [True] * len(takes)
    assert [choice.takes(ROW) for choice in leaves] == [False] * len(leaves)
    unscored = ROW | {"reward": None, "status": None, "quantile": None}
    assert Choice(status="unscored").takes(unscored)
    assert not Choice(reward=Span()).takes(unscored)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("0.5:1", 0.5, 1), (":1", float("-inf"), 1), ("-2:", -2, float("inf")), ("3", 3, 3)],
)
def test_spans_are_read(text: str, low: float, high: float) -> None:
    assert Span.parse(text, "--reward") == Span(low, high)


@pytest.mark.parametrize("text", ["", "a", "1:0", "nan", "nan:", "1:2:3", "a:b"])
def test_what_is_no_span_is_refused_by_name(text: str) -> None:
    with pytest.raises(QRPOError, match="is no span"):
        Span.parse(text, "--reward")


@given(st.lists(st.none() | st.floats(-5, 5), max_size=30), st.integers(1, 9))
def test_orders_are_sorted_and_rows_without_a_reward_come_last(
    rewards: list[float | None], limit: int
) -> None:
    rows = [ROW | {"reward": reward, "sample_index": index} for index, reward in enumerate(rewards)]
    known = sorted(reward for reward in rewards if reward is not None)
    nothing: list[float | None] = [None] * (len(rewards) - len(known))
    lowest = [row["reward"] for row in _first(rows, "lowest", limit)]
    highest = [row["reward"] for row in _first(rows, "highest", limit)]
    assert lowest == [*known, *nothing][:limit]
    assert highest == [*reversed(known), *nothing][:limit]
    assert _first(rows, "stored", limit) == rows[:limit]


def test_the_store_is_browsed_and_counted(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings | {"reward": REWARD}, sampling={"references_per_prompt": 6}))
    everything = browse(steps.workspace, Choice(), limit=10_000)
    rewards = steps.first.rewards.read()["reward"].to_pylist()
    assert everything.stored == everything.chosen == len(everything.rows) == len(rewards)
    assert sorted(row["reward"] for row in everything.rows) == sorted(rewards)
    top = browse(
        steps.workspace, Choice(quantile=Span(0.5, 1), source="references"), order="highest", limit=3
    )
    assert top.chosen == sum(row["quantile"] >= 0.5 for row in everything.rows)
    assert len(top.rows) == 3
    assert top.rows[0]["reward"] == max(rewards)
    with pytest.raises(QRPOError, match=r"'round 2'.*'references'"):
        browse(steps.workspace, Choice(source="round 2"))


def test_a_completion_cannot_steer_the_terminal() -> None:
    row = ROW | {"text": "one\x1b[2J\ntwo\r", "messages": [{"role": "user", "content": "\x1b]0;x\x07 hello"}]}
    for full in (False, True):
        text = "\n".join(browse_lines(Found([row], 1, 1, ("references",)), full=full, experiment="x.yaml"))
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert "two" in text
    assert "qrpo explain x.yaml 01234567:2" in text


def test_a_row_without_a_reward_says_why() -> None:
    row = ROW | {"reward": None, "status": "timeout", "detail": "60 s", "quantile": None}
    text = "\n".join(browse_lines(Found([row], 1, 1, ("references",)), full=False, experiment="x.yaml"))
    assert "timeout (60 s)" in text
