"""The reward `sentiment`: how positive a text is, by a lexicon."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from qrpo_core.rewards.base import RewardRequest, RowReward


class SentimentReward(RowReward):
    """The compound score of the VADER lexicon, in [-1, 1], which the library rounds to four decimals.

    A text without a word of the lexicon has 0. English only.
    Source: Hutto and Gilbert (2014), package vaderSentiment.
    """

    def score_row(self, request: RewardRequest) -> float:
        return float(self._analyser.polarity_scores(request.text)["compound"])

    @cached_property
    def _analyser(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        class Windowed(SentimentIntensityAnalyzer):  # type: ignore[misc]
            """The same scores in linear time.

            Two rules look at three words before and two behind a word, but lower the case of the whole text
            at every word of the lexicon. They get those six words instead.
            """

            @staticmethod
            def _negation_check(valence: float, words: list[str], start: int, i: int) -> Any:
                first = max(0, i - 3)
                return SentimentIntensityAnalyzer._negation_check(
                    valence, words[first : i + 3], start, i - first
                )

            @staticmethod
            def _special_idioms_check(valence: float, words: list[str], i: int) -> Any:
                first = max(0, i - 3)
                return SentimentIntensityAnalyzer._special_idioms_check(
                    valence, words[first : i + 3], i - first
                )

        return Windowed()
