"""What a reward sees of a completion: only the text that follows the thinking.

The rule is the same for every kind of reward, and `registry` applies it once:

- The text is cut behind its last closing mark. A template may open the thinking in its generation prompt, so
  that a completion carries the closing mark alone; it is cut there too.
- Thinking that is open at the end (the length limit cut it) leaves the empty text.
- A text without marks is an answer as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.rewards.base import CheckedReward, ReferenceProblem, RewardRequest, Score
from qrpo_core.rewards.config import ThinkingMarks

#: The detail of a row that was scored although its thinking never ended.
UNFINISHED = "the thinking does not end: an empty answer was graded"


def answer_after(text: str, marks: Sequence[ThinkingMarks], opening: str = "") -> str | None:
    """The part of a completion that follows its thinking; None where the thinking does not end.

    opening : what the chat template writes at the beginning of the assistant's turn.
    The completion itself is returned unchanged where it has no mark and the opening leaves none open.
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
    """A reward that grades what follows the thinking and passes on everything else.

    Completions without thinking reach the inner reward as they are. Where the thinking does not end, the
    inner reward scores the empty text, and an `ok` row says so in its detail.
    """

    def __init__(self, reward: CheckedReward, marks: Sequence[ThinkingMarks]) -> None:
        self._reward, self._marks = reward, tuple(marks)

    @property
    def needs_reference(self) -> bool:
        """Whether the inner reward needs one."""
        return self._reward.needs_reference

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """What the inner reward refuses."""
        return self._reward.problems(references)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests."""
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
        """Give back what the inner reward holds."""
        self._reward.close()
