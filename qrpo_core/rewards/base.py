"""The interface of every reward: completions in, a score or a reason for its absence out."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from qrpo_core.common.errors import DataError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.common.schemas import LARGEST_REWARD

Status = Literal["ok", "timeout", "sandbox_error", "parse_error", "too_long", "endpoint_error", "refused"]

#: Problem and remedy of a row without a ground truth.
_MISSING = (
    "no ground truth to score against",
    "name the column in prompts.ground_truth_field, or choose a reward that needs none",
)

#: Beginning of the detail of a row that got 0 because its library's scorer raised (math, reasoning_gym).
SCORER_RAISED = "the scorer raised"

#: Longest detail of a score, in characters: an exception may quote the whole completion.
DETAIL_LENGTH = 300


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to score.

    messages : the prompt, as (role, content) pairs.
    text : the completion, undecorated.
    ground_truth : JSON that the verifier checks against, or None.
    opening : text that the chat template writes before `text` in the assistant's turn, such as <think>.
    """

    prompt_id: str
    sample_index: int
    messages: tuple[tuple[str, str], ...]
    text: str
    ground_truth: str | None
    opening: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward, or the reason for its absence. Only `ok` enters a quantile; a wrong answer is `ok` with 0."""

    reward: float | None
    status: Status = "ok"
    detail: str = ""


@dataclass(frozen=True, slots=True)
class GroundTruthProblem:
    """A ground truth that a reward cannot use.

    row : its place among the ground truths that were checked, from 0.
    """

    row: int
    prompt_id: str
    problem: str
    remedy: str


class Reward(Protocol):
    """Scores completions. A row whose scorer raises has status `parse_error`, with the error as its detail.

    The kinds math and reasoning_gym give 0 instead: their libraries raise on many texts without an answer.
    """

    @property
    def needs_ground_truth(self) -> bool:
        """Whether it refuses rows without a ground truth."""
        ...

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return every ground truth that it cannot use, in their order, at most one problem a row.

        ground_truths : (prompt_id, ground truth) pairs; a ground truth is JSON, or None.

        Raises ConfigError or ModelError where the reward itself cannot be used.
        """
        ...

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests."""
        ...

    def close(self) -> None:
        """Free what it holds: a model's memory, processes, connections. It may be used again."""
        ...


class RowReward(ABC):
    """Base of rewards whose score of a row depends on that row alone.

    A subclass implements `score_row`, and `check_ground_truth` if its ground truths have a form.
    """

    _needs_ground_truth: ClassVar[bool] = False

    @property
    def needs_ground_truth(self) -> bool:
        """Whether it refuses rows without a ground truth."""
        return self._needs_ground_truth

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return every ground truth that is missing or of the wrong form. Equal ones are read once."""
        if not self.needs_ground_truth:
            return []
        found: list[GroundTruthProblem] = []
        seen: dict[str | None, tuple[str, str] | None] = {None: _MISSING}
        for row, (prompt_id, ground_truth) in enumerate(ground_truths):
            if ground_truth not in seen:
                assert ground_truth is not None
                seen[ground_truth] = self._problem_with(ground_truth)
            problem = seen[ground_truth]
            if problem is not None:
                found.append(GroundTruthProblem(row, prompt_id, *problem))
        return found

    def _problem_with(self, ground_truth: str) -> tuple[str, str] | None:
        try:
            self.check_ground_truth(ground_truth)
        except ValueError as error:
            return f"ground truth {clip(ground_truth, 80)} is refused", clip(str(error))
        return None

    def check_ground_truth(self, ground_truth: str) -> None:
        """Raise ValueError for a ground truth of the wrong form; the message says which form is needed."""
        read_json(ground_truth)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests. Calls `progress(1)` after each row.

        Raises DataError before it scores the first row (see `refuse`).
        """
        refuse(self, ((request.prompt_id, request.ground_truth) for request in requests))
        scores = []
        for request in requests:
            scores.append(guarded(partial(self.score_row, request)))
            progress(1)
        return scores

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Free what it holds: nothing, unless a subclass says otherwise."""

    @abstractmethod
    def score_row(self, request: RewardRequest) -> float | Score:
        """Return the reward of one row, or a `Score` that says why it has none. May raise: see `guarded`."""


def refuse(reward: Reward, ground_truths: Iterable[tuple[str, str | None]]) -> None:
    """Raise DataError if the reward cannot use a ground truth: it names the first and counts the others."""
    found = reward.problems(ground_truths)
    if found:
        more = f" (and {len(found) - 1} more ground truths)" if len(found) > 1 else ""
        raise DataError(found[0].problem + more, where=f"prompt {found[0].prompt_id}", remedy=found[0].remedy)


def guarded(score: Callable[[], float | Score]) -> Score:
    """Return the score of a call. An exception or what is no reward is a `parse_error` with its message."""
    try:
        result = score()
        if isinstance(result, Score):
            return result
        reward = float(result)
    except Exception as error:
        return Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))
    if not math.isfinite(reward):
        return Score(None, "parse_error", f"the scorer gave {reward}, which is not a finite number")
    if abs(reward) > LARGEST_REWARD:
        return Score(None, "parse_error", f"the scorer gave {reward:g}, which is beyond {LARGEST_REWARD:g}")
    return Score(reward)


def read_json(ground_truth: str) -> Any:
    """Return the value of a ground truth, numbers as exact Decimals. Raises ValueError if it is no JSON."""
    try:
        return json.loads(
            ground_truth, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("the ground truth is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"a ground truth has to be JSON ({error})") from None
    except ArithmeticError:
        raise ValueError("a number in it is too large to be read") from None


def clip(text: str, length: int = DETAIL_LENGTH) -> str:
    """Return the text on one line of at most `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that can be a ground truth")
