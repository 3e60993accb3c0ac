"""The decoding loop: which row is in which slot, and when it ends.

Rows are decoded together in the slots of a batch. The host looks at the drawn tokens after every few
steps (`DecodeSteps`); rows that ended give their slots to the next rows, so only a few steps compute rows
that have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from transformers.cache_utils import Cache

from qrpo_core.common.errors import EngineError
from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.batching import DecodeBatch, prefill_groups
from qrpo_core.engines.decode_steps import Decoder, DecodeSteps, Prompts
from qrpo_core.engines.sampling import uniforms
from qrpo_core.engines.slot_cache import check_cache

#: Where rows are admitted in groups: the share of slots that must be free.
_FREE_SHARE = 1 / 8


class BatchDecoding:
    """Decodes one batch; iterating yields (index of the request, its completion) as rows end.

    Parameters
    ----------
    steps_like : the batch's steps, for a cache with the layers and heads of a given one.
    steps_per_look : steps between two looks at the drawn tokens.
    prefill_tokens : tokens of a pass over several prompts, padding included. None prefills each prompt alone
        and gives a free slot to the next row at once; with a number, rows are admitted in groups.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: DecodeBatch,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        steps_like: Callable[[Cache], DecodeSteps],
        *,
        steps_per_look: int = 1,
        prefill_tokens: int | None = None,
    ) -> None:
        self._decoder, self._requests, self._params = decoder, requests, params
        self._steps_like, self._prefill_tokens = steps_like, prefill_tokens
        self._steps_per_look = steps_per_look
        self._stops = np.array(params.stop_token_ids, np.int64)
        self._waiting = deque(batch.rows)
        self._prefilled: tuple[Prompts, Cache] | None = None
        self._steps: DecodeSteps | None = None
        # Of each slot: the index of its request (-1: free), new tokens, last token and its position.
        self._rows = np.full(batch.slots, -1)
        self._counts, self._last, self._places = np.zeros((3, batch.slots), np.int64)
        # By slot and new token; the last steps may pass the limit.
        shape = (batch.slots, params.max_new_tokens + steps_per_look)
        self._noise = np.full(shape, 0.5)
        self._tokens = np.zeros(shape, np.int64)
        self._logprobs = np.zeros(shape)

    def __iter__(self) -> Iterator[tuple[int, Completion]]:
        while True:
            self._admit()
            if (self._rows < 0).all():
                return
            yield from self._decode()

    def _admit(self) -> None:
        """Put waiting rows into free slots and prefill their prompts."""
        free = np.flatnonzero(self._rows < 0)
        enough = 1 if self._prefill_tokens is None else max(1, int(len(self._rows) * _FREE_SHARE))
        if not self._waiting or len(free) < min(enough, len(self._waiting)):
            return
        takers: dict[tuple[int, ...], list[int]] = {}
        for slot in free[: len(self._waiting)]:
            row = self._waiting.popleft()
            request = self._requests[row]
            prompt = request.prompt_token_ids
            takers.setdefault(prompt, []).append(int(slot))
            self._rows[slot], self._counts[slot] = row, 0
            # The first step computes the prompt's last token again, and draws the first new one.
            self._last[slot], self._places[slot] = prompt[-1], len(prompt) - 1
            self._noise[slot, : self._params.max_new_tokens] = uniforms(
                request.seed, self._params.max_new_tokens
            )
        for prompts in prefill_groups(list(takers), self._prefill_tokens):
            cache = self._prefill(prompts)
            if self._steps is None:
                self._steps = self._steps_like(cache)
            pairs = [(slot, at) for at, prompt in enumerate(prompts) for slot in takers[prompt]]
            self._steps.cache.place([slot for slot, _ in pairs], cache, [at for _, at in pairs])

    def _prefill(self, prompts: Prompts) -> Cache:
        """The prompts' cache; the last one is kept, for further rows of the same prompts."""
        if self._prefilled is None or prompts != self._prefilled[0]:
            self._prefilled = None  # two at a time would take the memory twice
            cache = self._decoder.prefill(prompts)
            check_cache(cache, max(map(len, prompts)) + self._params.max_new_tokens)
            self._prefilled = prompts, cache
        return self._prefilled[1]

    def _decode(self) -> Iterator[tuple[int, Completion]]:
        """Run some steps and give out the rows that ended. Free slots are computed too."""
        assert self._steps is not None  # a slot is taken, so a prompt was prefilled
        taken = self._rows >= 0
        limit = self._params.max_new_tokens
        steps = min(self._steps_per_look, limit - int(self._counts[taken].min()))
        slots = np.arange(len(taken))
        span = self._counts + np.arange(steps)[:, None]
        drawn, logprobs = self._steps.run(self._last, self._places, self._noise[slots, span])
        self._tokens[slots, span], self._logprobs[slots, span] = drawn, logprobs
        stopped = np.isin(drawn, self._stops)
        ends = stopped | (span + 1 == limit)
        ended = ends.any(axis=0)
        final = np.where(ended, ends.argmax(axis=0), steps - 1)
        self._check_finite(logprobs, taken & (np.arange(steps)[:, None] <= final))
        for slot in np.flatnonzero(taken & ended):
            row = int(self._rows[slot])
            at = final[slot]
            yield row, self._completion(int(slot), int(span[at, slot]) + 1, bool(stopped[at, slot]))
        self._rows[ended] = -1
        going = self._rows >= 0
        self._counts = np.where(going, self._counts + steps, 0)
        self._places = np.where(going, self._places + steps, 0)
        self._last = np.where(going, drawn[-1], 0)

    def _check_finite(self, logprobs: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> None:
        """Raise EngineError for the first log-prob that is no finite number, among those that count."""
        bad = np.argwhere(counted & ~np.isfinite(logprobs))
        if len(bad):
            step, slot = bad[0]
            request = self._requests[self._rows[slot]]
            raise EngineError(
                f"the model's probabilities are not finite at new token {self._counts[slot] + step}",
                where=f"prompt {request.prompt_id}, sample {request.sample_index}",
                remedy="the weights may be damaged, or their precision too low",
            )

    def _completion(self, slot: int, count: int, stopped: bool) -> Completion:
        request = self._requests[self._rows[slot]]
        return Completion(
            request.prompt_id,
            request.sample_index,
            request.seed,
            tuple(self._tokens[slot, :count].tolist()),
            "stop" if stopped else "length",
            # One by one: another order of the sum would change its last digit with the steps a look.
            float(np.cumsum(self._logprobs[slot, :count])[-1]),
        )
