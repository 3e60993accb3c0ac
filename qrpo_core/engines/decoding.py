"""The decoding loop: prompts are read one by one, rows are decoded in the slots of a table.

A slot that becomes free is taken by the next row at once, so no step is spent on padding but the last few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.batching import Table
from qrpo_core.engines.noise import draw, uniforms
from qrpo_core.engines.slots import SlotCache, check_cache
from qrpo_core.errors import EngineError

#: Takes a request's index and its completion.
Finished = Callable[[int, Completion], None]


class Decoder:
    """What the loop needs of a model: read a prompt, take one step in every slot."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.device

    def read(self, prompt: Sequence[int]) -> tuple[Cache, torch.Tensor]:
        """The prompt's keys and values, and the logits [1, vocab] of the first new token.

        Read alone and unpadded: the shapes, and with them the last digits, follow from this prompt only.
        """
        ids = torch.tensor([list(prompt)], device=self._device)
        output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return output.past_key_values, output.logits[:, -1]

    def step(self, cache: SlotCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [slots, vocab] after `tokens` [slots], which stand at `cache.places`."""
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=cache.places[:, None],
            attention_mask=cache.mask(self._model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def slots_agree(self, cache: SlotCache) -> bool:
        """Whether, on this machine, a row's logits depend neither on its slot nor on the other slots.

        Tried, not assumed: one sequence in all slots must give equal logits bit for bit, and the same ones
        when the other slots hold something else. Overwrites the cache.
        """
        noise = torch.Generator().manual_seed(0)
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                one = torch.randn(states.shape[1:], generator=noise)
                states.copy_(one.to(states))
        middle = cache.positions // 2
        cache.places = torch.full_like(cache.rows, middle)
        tokens = torch.ones_like(cache.rows)
        alike = self.step(cache, tokens)
        kept = torch.zeros_like(cache.rows, dtype=torch.bool)
        kept[[0, cache.slots // 2, -1]] = True
        for layer in cache.layers:
            layer.keys[~kept] *= -0.5
            layer.values[~kept] *= 3.0
        cache.places = torch.where(kept, middle, cache.rows % cache.positions)
        mixed = self.step(cache, torch.where(kept, tokens, tokens + cache.rows % 2 - 1))
        return torch.equal(alike, alike[:1].expand_as(alike)) and torch.equal(mixed[kept], alike[kept])


class _Row:
    """A row that is being drawn."""

    def __init__(self, index: int, request: SampleRequest, params: SamplingParams) -> None:
        self.index, self.request, self._params = index, request, params
        self.noise = uniforms(request.seed, params.max_new_tokens)
        self.tokens: list[int] = []
        self._logprob = 0.0

    @property
    def place(self) -> int:
        """Position of the last token drawn."""
        return len(self.request.prompt_token_ids) + len(self.tokens) - 1

    def add(self, token: int, logprob: float) -> Completion | None:
        """Take a drawn token; the completion if it was the last."""
        if not np.isfinite(logprob):
            raise EngineError(
                f"the model's probabilities are not finite at new token {len(self.tokens)}",
                where=f"prompt {self.request.prompt_id}, sample {self.request.sample_index}",
                remedy="the weights may be damaged, or their precision too low",
            )
        self.tokens.append(token)
        self._logprob += logprob
        stopped = token in self._params.stop_token_ids
        if not stopped and len(self.tokens) < self._params.max_new_tokens:
            return None
        return Completion(
            self.request.prompt_id,
            self.request.sample_index,
            self.request.seed,
            tuple(self.tokens),
            "stop" if stopped else "length",
            self._logprob,
        )


class TableRun:
    """One table from its first row to its last.

    check : called with the decoder's fresh cache before any row enters it.
    """

    def __init__(
        self,
        decoder: Decoder,
        table: Table,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        check: Callable[[SlotCache], None],
    ) -> None:
        self._decoder, self._table, self._requests, self._params = decoder, table, requests, params
        self._check = check
        self._waiting = deque(table.rows)
        self._slots: list[_Row | None] = [None] * table.slots
        self._cache: SlotCache | None = None
        self._prompt: tuple[int, ...] | None = None
        self._read: tuple[Cache, torch.Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), as rows finish."""
        while True:
            yield from self._admit()
            active = [slot for slot, row in enumerate(self._slots) if row is not None]
            if not active:
                return
            yield from self._step(active)

    def _admit(self) -> Iterator[tuple[int, Completion]]:
        """Give free slots to waiting rows and draw their first tokens."""
        for slot, taken in enumerate(self._slots):
            while taken is None and self._waiting:
                index = self._waiting.popleft()
                row = _Row(index, self._requests[index], self._params)
                sequence, logits = self._reading(row.request.prompt_token_ids)
                noise = torch.tensor(row.noise[:1], device=logits.device)
                token, logprob = draw(logits, noise, self._params.temperature, self._params.top_p)
                done = row.add(int(token), float(logprob))
                if done is not None:
                    yield index, done
                    continue
                self._opened(sequence).place(slot, sequence)
                self._slots[slot] = taken = row

    def _step(self, active: list[int]) -> Iterator[tuple[int, Completion]]:
        """One token for every active slot. Free slots compute too: the shape stays the same."""
        cache = self._cache
        assert cache is not None  # a slot is active, so a row was placed
        tokens, places = torch.zeros((2, self._table.slots), dtype=torch.long)
        noise = torch.full((self._table.slots,), 0.5, dtype=torch.float64)
        for slot in active:
            row = self._slots[slot]
            assert row is not None
            tokens[slot], places[slot] = row.tokens[-1], row.place
            noise[slot] = row.noise[len(row.tokens)]
        device = cache.rows.device
        cache.places = places.to(device)
        logits = self._decoder.step(cache, tokens.to(device))
        drawn, logprobs = draw(logits, noise.to(device), self._params.temperature, self._params.top_p)
        for slot, token, logprob in zip(
            range(len(self._slots)), drawn.tolist(), logprobs.tolist(), strict=True
        ):
            row = self._slots[slot]
            if row is not None and (done := row.add(token, logprob)) is not None:
                self._slots[slot] = None
                yield row.index, done

    def _reading(self, prompt: tuple[int, ...]) -> tuple[Cache, torch.Tensor]:
        """The prompt as read; equal prompts are neighbours in a table and are read once."""
        if self._read is None or prompt != self._prompt:
            self._read, self._prompt = self._decoder.read(prompt), prompt
            check_cache(self._read[0], len(prompt) + self._params.max_new_tokens)
        return self._read

    def _opened(self, like: Cache) -> SlotCache:
        if self._cache is None:
            self._cache = SlotCache(like, self._table.slots, self._table.positions)
            self._check(self._cache)
        return self._cache
