"""Cut the thinking off a completion, so that a reward grades the answer alone.

`registry` applies one rule to every kind of reward:

- The answer begins behind the last closing mark. The opening mark may be missing, because a template may
  write it in its generation prompt.
- Thinking without an end (the length limit cut it) leaves the empty text.
- A text without marks is all answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.rewards import ThinkingMarks
from qrpo_core.rewards.base import GroundTruthProblem, Reward, RewardRequest, Score

#: Detail of a row whose thinking never ended.
UNFINISHED = "the thinking does not end: an empty answer was graded"


def answer_after(text: str, marks: Sequence[ThinkingMarks], opening: str = "") -> str | None:
    """Return the part of a completion behind its thinking; None if the thinking does not end.

    opening : text that the chat template writes at the beginning of the assistant's turn.
    """
    whole = opening + text
    closed = max(
        (whole.rfind(pair.close) + len(pair.close) for pair in marks if pair.close in whole), default=0
    )
    if any(whole.find(pair.open, closed) >= 0 for pair in marks):
        return None
    if closed <= len(opening):
        return text
    return whole[closed:].lstrip("\r\n")  # the line break belongs to the mark, as chat templates write it


class AnswerOnly:
    """A reward that gives its inner reward the answers without their thinking.

    If the thinking does not end, the inner reward scores the empty text, and the detail of an `ok` row says
    so.
    """

    def __init__(self, reward: Reward, marks: Sequence[ThinkingMarks]) -> None:
        self._reward, self._marks = reward, tuple(marks)

    @property
    def needs_ground_truth(self) -> bool:
        """Whether the inner reward refuses rows without a ground truth."""
        return self._reward.needs_ground_truth

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return the problems of the inner reward."""
        return self._reward.problems(ground_truths)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests."""
        answers = [answer_after(request.text, self._marks, request.opening) for request in requests]
        seen = [
            replace(request, text=answer or "", opening="")
            for request, answer in zip(requests, answers, strict=True)
        ]
        scores = self._reward.score(seen, progress)
        return [
            replace(score, detail=UNFINISHED) if answer is None and not score.detail else score
            for score, answer in zip(scores, answers, strict=True)
        ]

    def close(self) -> None:
        """Free what the inner reward holds."""
        self._reward.close()
