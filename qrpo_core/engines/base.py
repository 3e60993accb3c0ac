"""What every engine does: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

#: Called with the number of rows finished since the last call.
Progress = Callable[[int], None]

FinishReason = Literal["stop", "length"]


def no_progress(rows: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to draw. The seed alone decides the noise, so order and batch do not matter."""

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw. `stop_token_ids` are all the ids that end a completion (models have several)."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One drawn sample.

    token_ids : completion tokens, the end token included when it was drawn.
    finish_reason : "stop" if an end token was drawn, "length" if the limit cut it.
    logprob : sum of log-probs of token_ids in nats at temperature 1 and top_p 1 under the sampling
        model, or None where the engine does not give it.
    """

    prompt_id: str
    sample_index: int
    seed: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float | None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prompt and a completion whose log-probability is asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class Engine(Protocol):
    """Draws completions and scores them.

    name : written to every row that the engine draws.
    exact : whether a row depends on its request alone: drawn again in another batch, block or budget it
        has the same tokens. Where it is False the manifest says so.
    """

    name: str
    exact: bool

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        ...

    def logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats for every sequence; log-softmax and sum in float32.

        pi is softmax(logits / temperature). An engine that scores at temperature 1 alone refuses others.
        """
        ...

    def token_logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | what is before it) in nats, of every token of every completion."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...
