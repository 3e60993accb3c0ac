"""Sentiment, length and weighted sums."""

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentimentIntensityAnalyzer

from qrpo_core.common.errors import DataError
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import RewardRequest, RowReward, Score
from qrpo_core.rewards.length import LengthReward
from qrpo_core.rewards.registry import make_reward
from qrpo_core.rewards.sentiment import SentimentReward
from qrpo_core.rewards.weighted import WeightedReward


def request(text: str, ground_truth: str | None = None) -> RewardRequest:
    return RewardRequest("p", 0, (("user", "?"),), text, ground_truth)


SENTIMENT = SentimentReward()
PUBLISHED = SentimentIntensityAnalyzer()
LEXICON = sorted(PUBLISHED.lexicon)
# Words that its rules treat by themselves: negation, "least", "but", idioms, capitals, emoji.
RULE_WORDS = (
    "the a but But never so this without doubt no nor or least at very not isn't GREAT Good! bad? "
    "kind of the shit bad ass bus stop yeah right kiss of death to die for beating heart 😀"
)
WORDS = st.one_of(
    st.sampled_from(random.Random(0).sample(LEXICON, 300)),
    st.sampled_from(sorted(BOOSTER_DICT)),
    st.sampled_from(RULE_WORDS.split()),
)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("", 0, 0),
        ("...!?", 0, 0),
        ("The table is brown.", 0, 0),
        ("This is good.", 0.4, 0.5),
        ("This is not good.", -0.4, -0.3),
        ("This is VERY GOOD!!!", 0.6, 0.8),
        ("What a horrible, terrible day.", -0.9, -0.7),
        ("great " * 5000, 1, 1),
    ],
)
def test_sentiment(text: str, low: float, high: float) -> None:
    (score,) = SENTIMENT.score([request(text)])
    assert score.status == "ok"
    assert low <= score.reward <= high


@given(st.lists(WORDS, max_size=25))
def test_sentiment_is_the_published_compound_score(words: list[str]) -> None:
    text = " ".join(words)
    assert SENTIMENT.score([request(text)]) == [Score(PUBLISHED.polarity_scores(text)["compound"])]


@pytest.mark.parametrize(
    ("words", "characters"),
    # Fewer with "but": that rule of the lexicon's stays quadratic, at 3 s for 100,000 characters.
    [("the good ", 100_000), ("wonderful ", 100_000), ("but bad very ", 40_000), ("a ", 100_000)],
)
def test_sentiment_of_a_very_long_text(words: str, characters: int) -> None:
    text = (words * characters)[:characters]
    before = time.thread_time()
    (score,) = SENTIMENT.score([request(text)])
    # The published rules lower the case of all words for every word of the lexicon: minutes on these texts.
    assert time.thread_time() - before < 10
    assert score.status == "ok"


@pytest.mark.parametrize(
    ("low", "high", "words", "expected"),
    [
        (0, 10, 0, 1),
        (0, 10, 10, 1),
        (0, 10, 11, 0.9),
        (0, 10, 15, 0.5),
        (0, 10, 20, 0),
        (0, 10, 50_000, 0),
        (4, 10, 0, 0),
        (4, 10, 1, 0.25),
        (4, 10, 3, 0.75),
        (4, 10, 4, 1),
        (4, 4, 5, 0.75),
    ],
)
def test_length(low: int, high: int, words: int, expected: float) -> None:
    (score,) = LengthReward(low, high).score([request("w \n" * words)])
    assert score == Score(pytest.approx(expected))


def test_weighted_is_the_sum_of_weight_times_reward() -> None:
    config = RewardConfig(
        kind="weighted",
        terms=[
            {"weight": 2, "reward": {"kind": "number"}},
            {"weight": -0.5, "reward": {"kind": "length", "max_words": 2}},
            {
                "weight": 1,
                "reward": {"kind": "weighted", "terms": [{"weight": 3, "reward": {"kind": "exact"}}]},
            },
        ],
    )
    rows = [request("7", "7"), request("is 7", '"7"'), request("a b 8", "7")]
    scores = make_reward(config).score(rows)
    assert [score.reward for score in scores] == [2 - 0.5 + 3, 2 - 0.5, -0.25]


class Raises(RowReward):
    """Raises on the word it is given, else 1."""

    def score_row(self, request: RewardRequest) -> float:
        if request.text == "boom":
            raise RuntimeError("no\nscore")
        return {"nan": float("nan"), "inf": float("inf"), "huge": 1e308}.get(request.text, 1.0)


class TooLong(RowReward):
    """Refuses every row by status."""

    def score_row(self, request: RewardRequest) -> Score:
        return Score(None, "too_long", f"{len(request.text)} characters")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("boom", "RuntimeError: no score"),
        ("nan", "the scorer gave nan, which is not a finite number"),
        ("inf", "the scorer gave inf, which is not a finite number"),
        ("huge", "the scorer gave 1e+308, which is beyond 1e+100"),
    ],
)
def test_what_is_no_score_is_a_parse_error_and_not_0(text: str, detail: str) -> None:
    assert Raises().score([request(text), request("fine")]) == [
        Score(None, "parse_error", detail),
        Score(1.0),
    ]


def test_weighted_names_the_term_that_has_no_score() -> None:
    reward = WeightedReward(
        [("terms.0 (length)", 1.0, LengthReward(0, 9)), ("terms.1 (mine)", 1.0, Raises())]
    )
    assert reward.score([request("boom"), request("fine")]) == [
        Score(None, "parse_error", "terms.1 (mine): RuntimeError: no score"),
        Score(2.0),
    ]
    both = WeightedReward([("first", 1.0, TooLong()), ("second", 1.0, Raises())])
    assert both.score([request("boom")]) == [Score(None, "too_long", "first: 4 characters")]


def test_weighted_overflow_is_a_parse_error() -> None:
    reward = WeightedReward([("a", 1.0, Raises()), ("b", 1.0, Raises())])
    (score,) = reward.score([request("huge")])
    assert (score.reward, score.status) == (None, "parse_error")


def test_weighted_refuses_a_missing_ground_truth_before_any_term_is_scored() -> None:
    scored: list[str] = []

    class Notes(RowReward):
        def score_row(self, request: RewardRequest) -> float:
            scored.append(request.text)
            return 0.0

    config = RewardConfig(kind="number")
    reward = WeightedReward([("notes", 1.0, Notes()), ("number", 1.0, make_reward(config))])
    assert reward.needs_ground_truth
    with pytest.raises(DataError, match="no ground truth"):
        reward.score([request("a", json.dumps(1)), request("b", None)])
    assert scored == []


def test_weighted_progress_counts_whole_rows_over_all_terms() -> None:
    calls: list[int] = []
    reward = WeightedReward([("a", 1.0, LengthReward(0, 9)), ("b", 1.0, Raises())])
    reward.score([request("x")] * 5, calls.append)
    assert sum(calls) == 5
    assert len(calls) == 5
