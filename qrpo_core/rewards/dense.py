"""Rewards that need no reference: sentiment, length, and weighted sums of other rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.rewards.base import (
    CheckedReward,
    ReferenceProblem,
    RewardRequest,
    RowReward,
    Score,
    guarded,
    refuse,
)


class SentimentReward(RowReward):
    """The compound score of the VADER lexicon, in [-1, 1], rounded by it to four decimals.

    0 for a text without any word of the lexicon, the empty text included. English only.
    Source: Hutto and Gilbert (2014), package vaderSentiment.
    """

    def score_row(self, request: RewardRequest) -> float:
        return float(self._analyser.polarity_scores(request.text)["compound"])

    @cached_property
    def _analyser(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        class Windowed(SentimentIntensityAnalyzer):  # type: ignore[misc]
            """The same scores in a time that does not grow with the square of the length.

            The two rules look at three words before and two behind, but lower the case of the whole
            text for it at every word of the lexicon; they get those six words instead.
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


class LengthReward(RowReward):
    """1 from `min_words` to `max_words`; falls linearly to 0 at no words and at twice `max_words`.

    A word is what stands between white space. In [0, 1]; slopes and not steps, so that completions
    outside the bounds still differ in rank.
    """

    def __init__(self, min_words: int, max_words: int) -> None:
        self._min, self._max = min_words, max_words

    def score_row(self, request: RewardRequest) -> float:
        words = len(request.text.split())
        if words < self._min:
            return words / self._min
        return max(0.0, 1.0 - max(0, words - self._max) / self._max)


class WeightedReward:
    """The sum of weight times reward over its terms.

    A row on which a term is not ok has the status of the first such term, and its detail behind the
    term's place and kind: a sum without one of its terms would be a different reward.

    terms : (name, weight, reward); a name says which term it is, as in "terms.0 (sentiment)".
    """

    def __init__(self, terms: Sequence[tuple[str, float, CheckedReward]]) -> None:
        self._terms = list(terms)

    @property
    def needs_reference(self) -> bool:
        """Whether any term does."""
        return any(reward.needs_reference for _, _, reward in self._terms)

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """What any term refuses; of a row that several refuse, the first term's problem."""
        pairs = list(references)
        found: dict[int, ReferenceProblem] = {}
        for _, _, reward in self._terms:
            for problem in reward.problems(pairs):
                found.setdefault(problem.row, problem)
        return [found[row] for row in sorted(found)]

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests; a term's row is a share of a row."""
        # All terms before the first score: a term's refusal must not come after another term's work.
        refuse(self, ((request.prompt_id, request.reference) for request in requests))
        counted = _whole_rows(progress, len(self._terms))
        columns = [reward.score(requests, counted) for _, _, reward in self._terms]
        return [self._sum(row) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Give back what the terms hold."""
        for _, _, reward in self._terms:
            reward.close()

    def _sum(self, row: Sequence[Score]) -> Score:
        products = []
        for (name, weight, _), score in zip(self._terms, row, strict=True):
            if score.status != "ok" or score.reward is None:
                return Score(None, score.status, f"{name}: {score.detail}")
            products.append(weight * score.reward)
        return guarded(lambda: math.fsum(products))


def _whole_rows(progress: Progress, terms: int) -> Progress:
    """A `Progress` for rows of single terms that passes on whole rows."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        if whole := done // terms - before // terms:
            progress(whole)

    return count
