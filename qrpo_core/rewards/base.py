"""What every reward does: completions in, a score or a reason for none out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qrpo_core.engines.base import Progress, no_progress

Status = Literal["ok", "timeout", "sandbox_error", "parse_error", "too_long", "endpoint_error"]


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to score.

    messages : the prompt, as (role, content) pairs.
    text : the completion, undecorated.
    reference : JSON that the verifier checks against, or None.
    """

    prompt_id: str
    sample_index: int
    messages: tuple[tuple[str, str], ...]
    text: str
    reference: str | None


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
