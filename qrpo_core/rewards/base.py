"""What every reward does: completions in, a score or a reason for none out."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import DataError

Status = Literal["ok", "timeout", "sandbox_error", "parse_error", "too_long", "endpoint_error", "refused"]

#: What is said of a row without a reference, and the remedy.
_MISSING = (
    "no reference to score against",
    "name the column in prompts.reference_field, or choose a reward that needs none",
)

#: How the detail of a row begins that is wrong because a library's scorer raised on it.
SCORER_RAISED = "the scorer raised"

#: Longest detail that a score carries; an exception may quote the whole completion.
DETAIL_LENGTH = 300


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to score.

    messages : the prompt, as (role, content) pairs.
    text : the completion, undecorated.
    reference : JSON that the verifier checks against, or None.
    opening : what the chat template wrote at the beginning of the assistant's turn, before `text`, such as
        the mark that opens the thinking.
    """

    prompt_id: str
    sample_index: int
    messages: tuple[tuple[str, str], ...]
    text: str
    reference: str | None
    opening: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward, or why there is none. Only `ok` enters a quantile; a wrong answer is `ok` with reward 0."""

    reward: float | None
    status: Status = "ok"
    detail: str = ""


class Reward(Protocol):
    """Scores completions. A scorer that raises gives `parse_error` with its message, never 0."""

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests."""
        ...

    def close(self) -> None:
        """Give back what it holds: a model's memory, processes, connections. It may be used again."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceProblem:
    """A reference that a reward cannot score against.

    row : its place among the references that were checked, from 0.
    """

    row: int
    prompt_id: str
    problem: str
    remedy: str


class CheckedReward(Reward, Protocol):
    """A reward that says beforehand what it cannot score against."""

    @property
    def needs_reference(self) -> bool:
        """Whether a row without a reference cannot be scored."""
        ...

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """Every reference that cannot be scored against, in their order, at most one problem a row.

        references : (prompt_id, reference) pairs; a reference is JSON, or None where there is none.
        Raises ConfigError or ModelError where the reward itself cannot be used.
        """
        ...


class RowReward(ABC):
    """A `CheckedReward` that scores each row by itself: a score depends on its own request and nothing else.

    A subclass gives `score_row`, and `check_reference` where the reference has a form.
    """

    _needs_reference: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """Whether a row without a reference cannot be scored."""
        return self._needs_reference

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """Every reference that is missing or of the wrong form. Equal ones are read once.

        references : (prompt_id, reference) pairs; a reference is JSON, or None.
        """
        if not self.needs_reference:
            return []
        found: list[ReferenceProblem] = []
        seen: dict[str | None, tuple[str, str] | None] = {None: _MISSING}
        for row, (prompt_id, reference) in enumerate(references):
            if reference not in seen:
                assert reference is not None
                seen[reference] = self._problem_with(reference)
            problem = seen[reference]
            if problem is not None:
                found.append(ReferenceProblem(row, prompt_id, *problem))
        return found

    def _problem_with(self, reference: str) -> tuple[str, str] | None:
        try:
            self.check_reference(reference)
        except ValueError as error:
            return f"reference {clip(reference, 80)} is refused", clip(str(error))
        return None

    def check_reference(self, reference: str) -> None:
        """Raise ValueError, saying what a reference has to be, for JSON that is not that."""
        read_json(reference)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests; `progress(1)` after each row.

        Raises DataError before the first row is scored (see `refuse`).
        """
        refuse(self, ((request.prompt_id, request.reference) for request in requests))
        scores = []
        for request in requests:
            scores.append(guarded(partial(self.score_row, request)))
            progress(1)
        return scores

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Give back what it holds; nothing, unless a subclass says otherwise."""

    @abstractmethod
    def score_row(self, request: RewardRequest) -> float | Score:
        """The reward of one row, or a `Score` that says why there is none. May raise: see `guarded`."""


def refuse(reward: CheckedReward, references: Iterable[tuple[str, str | None]]) -> None:
    """Raise a DataError that names the first reference that cannot be scored against, and counts the rest."""
    found = reward.problems(references)
    if found:
        more = f" (and {len(found) - 1} more references)" if len(found) > 1 else ""
        raise DataError(found[0].problem + more, where=f"prompt {found[0].prompt_id}", remedy=found[0].remedy)


def guarded(score: Callable[[], float | Score]) -> Score:
    """Run a scorer; what it raises, and NaN or infinity, becomes a `parse_error` with its message."""
    try:
        result = score()
        if isinstance(result, Score):
            return result
        reward = float(result)
    except Exception as error:
        return Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))
    if not math.isfinite(reward):
        return Score(None, "parse_error", f"the scorer gave {reward}, which is not a finite number")
    return Score(reward)


def read_json(reference: str) -> Any:
    """A reference's value, numbers as exact Decimals. Raises ValueError for what is not JSON."""
    try:
        return json.loads(reference, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("a reference nested this deeply is not read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"a reference is JSON ({error})") from None
    except ArithmeticError:
        raise ValueError("a number in it is too large to be read") from None


def clip(text: str, length: int = DETAIL_LENGTH) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that can be a reference")
