"""The reward `length`: whether a text has a number of words between two bounds."""

from __future__ import annotations

from qrpo_core.rewards.base import RewardRequest, RowReward


class LengthReward(RowReward):
    """1 from `min_words` to `max_words`; falls linearly to 0 at no words and at twice `max_words`.

    White space separates words. The reward is in [0, 1]. It has slopes instead of steps, so that completions
    outside the bounds still differ in rank.
    """

    def __init__(self, min_words: int, max_words: int) -> None:
        self._min, self._max = min_words, max_words

    def score_row(self, request: RewardRequest) -> float:
        words = len(request.text.split())
        if words < self._min:
            return words / self._min
        return max(0.0, 1.0 - max(0, words - self._max) / self._max)
