"""One suite for all kinds of reward: what every one of them promises."""

import json
import math
import threading
from collections.abc import Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.config import RewardConfig
from qrpo_core.errors import DataError
from qrpo_core.records import STATUSES
from qrpo_core.rewards.base import CheckedReward, Reward, RewardRequest, Score
from qrpo_core.rewards.registry import check_references, make_reward, needs_reference

SUM = {
    "task": "chain_sum",
    "parameters": {"min_terms": 2, "max_terms": 2},
    "entry": {"question": "4 - 1 =", "answer": "3", "metadata": {}},
}
FACTORS = {
    "task": "prime_factorization",
    "parameters": {},
    "entry": {"question": "6", "answer": "2 × 3", "metadata": {"number": 6}},
}

# kind: its section, and references of the forms that it takes.
KINDS: dict[str, tuple[dict, list[object]]] = {
    "number": ({}, [3, -0.5, "#### 1,234", "$3"]),
    "exact": ({}, ["3", "Paris", 12]),
    "reasoning_gym": ({"extract": "last_line"}, [SUM, FACTORS]),
    "math": ({}, [3, "\\frac{1}{2}", "x+1"]),
    "sentiment": ({}, [None]),
    "length": ({"min_words": 2, "max_words": 5}, [None]),
    "weighted": (
        {
            "terms": [
                {"weight": 1.0, "reward": {"kind": "number"}},
                {"weight": 0.1, "reward": {"kind": "sentiment"}},
                {"weight": -0.3, "reward": {"kind": "length", "max_words": 3}},
            ]
        },
        [3, "#### 1,234"],
    ),
}

NASTY = [
    "",
    " \n\t",
    "...!?",
    "3",
    "-3",
    "\u22123",
    "\uff13",
    "The answer is 3.",
    "3, not 4",
    "1,234.50",
    "4 - 1 = 3",
    "3kg",
    "\\boxed{3}",
    "$\\frac{1}{2}$",
    "<answer>3</answer>",
    "2 × 3",
    "x × y",
    "Great! I love it, but not the end.",
    "NaN inf 1e999 -Infinity",
    "\x00\ud800\u202e{}[]\\",
    '{"value": 1}\n{"error": "x"}',
    "9" * 5000,
    "word " * 20_000,
    "1" * 100_000,
]


@lru_cache
def reward(kind: str) -> Reward:
    """One reward a kind for the whole suite: the scoring processes start once."""
    return make_reward(config(kind))


def config(kind: str) -> RewardConfig:
    return RewardConfig(kind=kind, **KINDS[kind][0])


def request(text: str, reference: object, row: int = 0) -> RewardRequest:
    encoded = None if reference is None else json.dumps(reference)
    return RewardRequest(f"prompt-{row}", row, (("user", "?"),), text, encoded)


def rows(kind: str) -> list[RewardRequest]:
    references = KINDS[kind][1]
    return [request(text, references[i % len(references)], i) for i, text in enumerate(NASTY)]


def in_a_thread(kind: str, requests: Sequence[RewardRequest]) -> list[Score]:
    found: list[Score] = []
    thread = threading.Thread(target=lambda: found.extend(reward(kind).score(requests)))
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_completions_get_a_score_or_a_reason(kind: str) -> None:
    scores = reward(kind).score(rows(kind))
    assert len(scores) == len(NASTY)
    for score in scores:
        assert score.status in STATUSES
        if score.status == "ok":
            assert type(score.reward) is float
            assert math.isfinite(score.reward)
            assert score.detail == ""
        else:
            assert score.reward is None
            assert score.detail
            assert "\n" not in score.detail
            assert len(score.detail) <= 400
    assert scores[0].status == "ok"  # an empty completion is a completion


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_score_depends_on_its_row_alone(kind: str, data: st.DataObject) -> None:
    # Not on batch, order, thread, or what was scored before.
    texts = st.one_of(st.sampled_from(NASTY[:-3]), st.text(max_size=30))
    drawn = data.draw(st.lists(st.tuples(texts, st.sampled_from(KINDS[kind][1])), min_size=1, max_size=6))
    requests = [request(text, reference, row) for row, (text, reference) in enumerate(drawn)]
    together = reward(kind).score(requests)
    order = data.draw(st.permutations(range(len(requests))))
    shuffled = reward(kind).score([requests[place] for place in order])
    assert [shuffled[order.index(place)] for place in range(len(requests))] == together
    assert [reward(kind).score([single])[0] for single in requests] == together
    assert in_a_thread(kind, requests) == together


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_score_at_the_same_time_do_not_mix(kind: str) -> None:
    requests = rows(kind)
    expected = reward(kind).score(requests)
    found: dict[int, list[Score]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: reward(kind).score(requests)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == [expected] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_reward_of_the_same_section_gives_the_same_scores(kind: str) -> None:
    assert make_reward(config(kind)).score(rows(kind)) == reward(kind).score(rows(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_progress_is_called_for_every_row(kind: str) -> None:
    calls: list[int] = []
    reward(kind).score(rows(kind), calls.append)
    assert sum(calls) == len(NASTY)
    assert all(call > 0 for call in calls)
    assert len(calls) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_no_scores(kind: str) -> None:
    calls: list[int] = []
    assert reward(kind).score([], calls.append) == []
    assert calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_reference_is_refused_before_anything_is_scored(kind: str) -> None:
    calls: list[int] = []
    present = request("3", KINDS[kind][1][0], 0)
    missing = request("3", None, 1)
    if not needs_reference(config(kind)):
        assert [score.status for score in reward(kind).score([present, missing])] == ["ok", "ok"]
        check_references(config(kind), [("prompt-1", None)])
        return
    with pytest.raises(DataError) as caught:
        reward(kind).score([present, missing], calls.append)
    assert calls == []
    assert caught.value.where == "prompt prompt-1"
    assert "no reference" in caught.value.message
    assert caught.value.remedy
    with pytest.raises(DataError, match="no reference"):
        check_references(config(kind), [("prompt-1", None)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_of_this_suite_pass_the_check(kind: str) -> None:
    references = [(str(row), request("", value).reference) for row, value in enumerate(KINDS[kind][1])]
    made = reward(kind)
    assert isinstance(made.needs_reference, bool)  # type: ignore[attr-defined]
    checked: CheckedReward = made  # type: ignore[assignment]
    checked.check(references)
