"""The reward `weighted`: a weighted sum of other rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.rewards.base import GroundTruthProblem, Reward, RewardRequest, Score, guarded, refuse


class WeightedReward:
    """The sum of weight times reward over its terms.

    A row on which a term is not ok has the status of the first such term. Its detail names the term: a sum
    without one of its terms would be a different reward.

    terms : (name, weight, reward); a name is the place and kind, such as "terms.0 (sentiment)".
    """

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]) -> None:
        self._terms = list(terms)

    @property
    def needs_ground_truth(self) -> bool:
        """Whether any term needs one."""
        return any(reward.needs_ground_truth for _, _, reward in self._terms)

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return the problems of all terms; a row that several terms refuse has the problem of the first."""
        pairs = list(ground_truths)
        found: dict[int, GroundTruthProblem] = {}
        for _, _, reward in self._terms:
            for problem in reward.problems(pairs):
                found.setdefault(problem.row, problem)
        return [found[row] for row in sorted(found)]

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request. Progress counts a row when all terms have scored it."""
        # Before any term scores: a refusal must not come after another term's work.
        refuse(self, ((request.prompt_id, request.ground_truth) for request in requests))
        counted = _whole_rows(progress, len(self._terms))
        columns = [reward.score(requests, counted) for _, _, reward in self._terms]
        return [self._sum(row) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Free what the terms hold."""
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
    """Return a `Progress` that takes rows of single terms and reports whole rows."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        if whole := done // terms - before // terms:
            progress(whole)

    return count
