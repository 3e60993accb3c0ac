"""A deterministic engine without weights: for tests, for trying a pipeline, for teaching its code."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qrpo_core.engines.base import (
    Completion,
    Progress,
    SampleRequest,
    SamplingParams,
    ScoreRequest,
    no_progress,
)
from qrpo_core.engines.batching import check_samples, check_scores
from qrpo_core.engines.noise import uniforms
from qrpo_core.errors import EngineError

#: Different next-token distributions; which one applies follows from all tokens so far.
_STATES = 8

Floats = npt.NDArray[np.float64]


class FakeEngine:
    """A small Markov model over the vocabulary, the same for every policy.

    Parameters
    ----------
    vocab_size : ids below it are drawn.
    stop_token_ids : share `end_probability` at every step; no other request parameter changes the model.
    end_probability : chance that a token ends the completion: the mean length is its inverse.
    seconds_per_row : time that drawing or scoring a row pretends to take.
    max_length : longest sequence, None for no limit.

    Samples and log-probs agree exactly, and the law of engines holds: a row depends on its request alone.
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
        self._running: dict[tuple[float, float], Floats] = {}

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        table = self._table()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        if (asked := (params.temperature, params.top_p)) not in self._running:
            self._running = {asked: _running_sums(table, *asked)}
        running = self._running[asked]
        drawn = []
        for request in requests:
            drawn.append(_draw(request, params, table, running))
            time.sleep(self._seconds_per_row)
            progress(1)
        return drawn

    def logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log-probability of every completion in nats, [sequences]."""
        return np.array([scores.sum() for scores in self.token_logprobs(sequences, progress, temperature)])

    def token_logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[Floats]:
        """log-probability of every token of every completion in nats."""
        table = self._table()
        check_scores(
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
        """Give the memory back; the engine is of no use afterwards."""
        self._logprobs = None
        self._running = {}

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


def _running_sums(logprobs: Floats, temperature: float, top_p: float) -> Floats:
    """Cumulative distribution of every state [states, vocab] at a temperature, cut to mass top_p."""
    weights = np.exp(logprobs / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-weights, axis=1, kind="stable")
        mass = np.take_along_axis(weights, order, axis=1)
        mass[np.cumsum(mass, axis=1) - mass >= top_p] = 0.0
        np.put_along_axis(weights, order, mass, axis=1)
    return np.cumsum(weights, axis=1)


def _draw(request: SampleRequest, params: SamplingParams, logprobs: Floats, running: Floats) -> Completion:
    noise = uniforms(request.seed, params.max_new_tokens)
    state = _state(request.prompt_token_ids)
    tokens: list[int] = []
    total = 0.0
    for number in noise:
        line = running[state]
        # The running sum must pass the number: an entry without mass is never taken, nor one past the last.
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
