"""The interface of engines: token ids in, token ids out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qrpo_core.common.progress import Progress, no_progress

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to draw. Its random numbers follow from its seed alone, not from its place in a batch."""

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings. stop_token_ids : every id that ends a completion; models have several."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One drawn sample.

    token_ids : completion tokens, including the end token if it was drawn.
    finish_reason : "stop" if an end token was drawn, "length" if the limit cut the completion.
    logprob : sum of the log-probs of token_ids in nats at temperature 1 and top_p 1 under the sampling
        model, or None if the engine does not report it.
    """

    prompt_id: str
    sample_index: int
    seed: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float | None


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """A prompt and a completion whose log-probs an engine computes."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class Engine(ABC):
    """Draws completions and computes log-probabilities.

    name : stored with every row that the engine draws.
    exact : whether a row depends on its request alone: drawn again in another batch, block or budget, it
        has the same tokens. Manifests record it.

    A subclass defines `sample`, `token_logprobs` and `close`.
    """

    name: str
    exact: bool

    @abstractmethod
    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion for each request, in their order."""

    def logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats, [sequences]: the sums of `token_logprobs`."""
        rows = self.token_logprobs(sequences, progress, temperature)
        return np.array([logprobs.sum() for logprobs in rows], np.float64)

    @abstractmethod
    def token_logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | preceding tokens) in nats, an array for each completion; log-softmax in float32.

        pi is softmax(logits / temperature). An engine that computes log-probs only at temperature 1 refuses
        others.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the memory. A closed engine raises EngineError."""
