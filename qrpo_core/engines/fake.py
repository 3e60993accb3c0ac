"""A deterministic engine without weights, for tests and for trying out a pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import EngineError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.sampling import uniforms
from qrpo_core.engines.validation import check_logprob_requests, check_samples

#: States of the Markov model, each with its next-token distribution.
_STATES = 8

Floats = npt.NDArray[np.float64]


class FakeEngine(Engine):
    """A small Markov model over the vocabulary, the same for every policy.

    Parameters
    ----------
    vocab_size : ids below it are drawn.
    stop_token_ids : have probability `end_probability` together, at every step.
    end_probability : the mean length of a completion is its inverse.
    seconds_per_row : time to sleep for each row that is drawn or whose log-probs are computed.
    max_length : longest sequence; None for no limit.

    Samples and log-probs agree exactly, and a row depends on its request alone.
    """

    def __init__(
        self,
        vocab_size: int,
        stop_token_ids: Sequence[int],
        *,
        end_probability: float = 1 / 16,
        seconds_per_row: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        ends = sorted(set(stop_token_ids))
        if (
            not 0 < end_probability < 1
            or vocab_size <= len(ends)
            or any(not 0 <= i < vocab_size for i in ends)
        ):
            raise EngineError(
                f"end_probability {end_probability} must be in (0, 1), stop_token_ids {ends} within a "
                f"vocabulary of {vocab_size} that has others too"
            )
        self.name = "fake"
        self.exact = True
        self._vocab_size, self._max_length = vocab_size, max_length
        self._seconds_per_row = seconds_per_row
        logits = np.stack([3.0 * uniforms(state, vocab_size) for state in range(_STATES)])
        weights = np.exp(logits)
        weights[:, ends] = 0.0
        weights *= (1.0 - end_probability if ends else 1.0) / weights.sum(axis=1, keepdims=True)
        weights[:, ends] = end_probability / max(len(ends), 1)
        self._logprobs: Floats | None = np.log(weights)
        self._cumulative: dict[tuple[float, float], Floats] = {}

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion for each request, in their order."""
        table = self._table()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        settings = (params.temperature, params.top_p)
        if settings not in self._cumulative:
            self._cumulative = {settings: _cumulative(table, *settings)}
        cumulative = self._cumulative[settings]
        drawn = []
        for request in requests:
            drawn.append(_draw(request, params, table, cumulative))
            time.sleep(self._seconds_per_row)
            progress(1)
        return drawn

    def token_logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[Floats]:
        """log-probabilities of the tokens of each completion in nats."""
        table = self._table()
        check_logprob_requests(
            sequences, vocab_size=self._vocab_size, max_length=self._max_length, temperature=temperature
        )
        if temperature != 1:
            table = table / temperature
            table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
        rows = []
        for sequence in sequences:
            state = _state(sequence.prompt_token_ids)
            scores = np.zeros(len(sequence.token_ids))
            for place, token in enumerate(sequence.token_ids):
                scores[place] = table[state, token]
                state = _next(state, token)
            rows.append(scores)
            time.sleep(self._seconds_per_row)
            progress(1)
        return rows

    def close(self) -> None:
        """Release the memory."""
        self._logprobs = None
        self._cumulative = {}

    def _table(self) -> Floats:
        if self._logprobs is None:
            raise EngineError("the engine is closed", remedy="make a new one")
        return self._logprobs


def _state(token_ids: Sequence[int]) -> int:
    state = 0
    for token in token_ids:
        state = _next(state, token)
    return state


def _next(state: int, token: int) -> int:
    return (5 * state + token + 1) % _STATES


def _cumulative(logprobs: Floats, temperature: float, top_p: float) -> Floats:
    """Cumulative distribution of every state, [states, vocab], at a temperature and cut to mass top_p."""
    weights = np.exp(logprobs / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-weights, axis=1, kind="stable")
        mass = np.take_along_axis(weights, order, axis=1)
        mass[np.cumsum(mass, axis=1) - mass >= top_p] = 0.0
        np.put_along_axis(weights, order, mass, axis=1)
    return np.cumsum(weights, axis=1)


def _draw(request: SampleRequest, params: SamplingParams, logprobs: Floats, cumulative: Floats) -> Completion:
    noise = uniforms(request.seed, params.max_new_tokens)
    state = _state(request.prompt_token_ids)
    tokens: list[int] = []
    total = 0.0
    for number in noise:
        line = cumulative[state]
        # The cumulative sum must exceed the number, so a token without mass is never drawn.
        token = int(np.searchsorted(line, min(number * line[-1], np.nextafter(line[-1], 0.0)), side="right"))
        tokens.append(token)
        total += float(logprobs[state, token])
        state = _next(state, token)
        if token in params.stop_token_ids:
            break
    return Completion(
        request.prompt_id,
        request.sample_index,
        request.seed,
        tuple(tokens),
        "stop" if tokens[-1] in params.stop_token_ids else "length",
        total,
    )
