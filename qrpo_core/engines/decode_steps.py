"""The part of decoding that runs on the device: prefill, one step in all slots, and several steps in a row.

Tokens, positions and random numbers of several steps are on the device, and a step reads nothing back. On
CUDA a step is captured once as a graph and replayed: a small model's step is then its kernels' time, not that
of their hundreds of launches. The host looks at the drawn tokens once for several steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache

from qrpo_core.engines.base import SamplingParams
from qrpo_core.engines.batching import visible_for
from qrpo_core.engines.sampling import draw_tokens
from qrpo_core.engines.slot_cache import SlotCache

_logger = logging.getLogger("qrpo.sample")

Prompts = Sequence[tuple[int, ...]]

#: The least share of slots in which a captured step must draw the plain step's token. Products may be summed
#: in another order, which changes one token in about a thousand.
_SAME = 0.9


class Decoder:
    """A model's two operations: prefill prompts, and decode one token in every slot."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.device

    def prefill(self, prompts: Prompts) -> Cache:
        """The prompts' keys and values, padded on the right.

        No token sees the padding behind it, so there is no mask. A prompt that is given alone is computed
        unpadded, so its last digits do not depend on other prompts.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        output = self._model.base_model(input_ids=ids.to(self._device), use_cache=True)
        return output.past_key_values

    def step(self, cache: SlotCache, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [slots, vocab] after `tokens` [slots], which are at the positions `cache.places`."""
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

        A test: one sequence in all slots must give equal logits, bit for bit, and the same logits when the
        other slots hold something else. Overwrites the cache.
        """
        noise = torch.Generator().manual_seed(0)
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                one = torch.randn(states.shape[1:], generator=noise)
                states.copy_(one.to(states))
        middle = cache.positions // 2
        cache.places.fill_(middle)
        tokens = torch.ones_like(cache.rows)
        alike = self.step(cache, tokens)
        kept = torch.zeros_like(cache.rows, dtype=torch.bool)
        kept[[0, cache.slots // 2, -1]] = True
        for layer in cache.layers:
            layer.keys[~kept] *= -0.5
            layer.values[~kept] *= 3.0
        cache.places.copy_(torch.where(kept, middle, cache.rows % cache.positions))
        mixed = self.step(cache, torch.where(kept, tokens, tokens + cache.rows % 2 - 1))
        return torch.equal(alike, alike[:1].expand_as(alike)) and torch.equal(mixed[kept], alike[kept])


class DecodeSteps:
    """Up to `most_steps` decoding steps in all slots of a cache between two looks by the host.

    A row that ends between two looks goes on until the next; the caller discards those tokens. Its values do
    not reach other slots.
    """

    def __init__(self, decoder: Decoder, cache: SlotCache, params: SamplingParams, most_steps: int) -> None:
        self.cache, self.most_steps = cache, most_steps
        self._decoder, self._params = decoder, params
        device, shape = cache.rows.device, (most_steps, cache.slots)
        self._tokens = torch.zeros_like(cache.rows)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._noise = torch.full(shape, 0.5, dtype=torch.float64, device=device)
        #: Tokens and log-probs. float64 holds every token id, so the host reads one tensor.
        self._drawn = torch.zeros((2, *shape), dtype=torch.float64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Autocast keeps casted weights, which a graph must not.
        self._captures = device.type == "cuda" and not torch.is_autocast_enabled("cuda")

    def fit(self, slots: int, positions: int, params: SamplingParams) -> bool:
        """Whether these buffers and graphs serve rows of other requests, too."""
        same = (params.temperature, params.top_p) == (self._params.temperature, self._params.top_p)
        return same and self.cache.slots == slots and self.cache.positions >= positions

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        noise: npt.NDArray[np.float64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Draw len(noise) tokens in every slot; the cache holds what precedes `tokens`.

        Parameters
        ----------
        tokens, places : [slots], each slot's last token and its position.
        noise : [steps, slots] in [0, 1), one number a step; at most `most_steps` steps.

        Returns
        -------
        (tokens, their log-probs), both [steps, slots].
        """
        steps = len(noise)
        cache = self.cache
        if cache.rows.device.type != "cpu":
            cache.visible = visible_for(int(places.max()) + steps, cache.positions)

        def load() -> None:
            self._tokens.copy_(torch.from_numpy(tokens))
            cache.places.copy_(torch.from_numpy(places))
            self._noise[:steps].copy_(torch.from_numpy(noise))
            self._at.zero_()

        step = self._captured(load)
        load()
        for _ in range(steps):
            step()
        drawn = self._drawn[:, :steps].cpu().numpy()
        return drawn[0].astype(np.int64), drawn[1]

    def _step(self) -> None:
        """One step from buffers to buffers, without a look by the host."""
        logits = self._decoder.step(self.cache, self._tokens)
        noise = self._noise.index_select(0, self._at)[0]
        tokens, logprobs = draw_tokens(logits, noise, self._params.temperature, self._params.top_p)
        self._drawn.index_copy_(1, self._at, torch.stack((tokens.double(), logprobs))[:, None])
        self._tokens.copy_(tokens)
        self.cache.places.add_(1).clamp_(max=self.cache.positions - 1)  # of rows that ended meanwhile
        self._at.add_(1).remainder_(self.most_steps)

    def _captured(self, load: Callable[[], None]) -> Callable[[], None]:
        """The step for the cache's visible positions: a graph's replay on CUDA, else the plain one."""
        visible = self.cache.visible
        if self._captures and visible not in self._graphs:
            try:
                self._graphs[visible] = self._capture(load)
            except RuntimeError as error:
                _logger.warning("decoding goes on without CUDA graphs, slower: %s", str(error).split("\n")[0])
                self._captures = False
                self._graphs.clear()
        return self._graphs[visible].replay if self._captures else self._step

    def _capture(self, load: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture a step; RuntimeError if it cannot be captured or draws other tokens than the plain one.

        Steps that run here start from the loaded tokens, so they write into the cache what `run` will
        write again. As torch's notes on CUDA graphs ask, the plain step runs first, on a stream of its own.
        """
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                load()
                self._step()
            plain = self._drawn[0, 0].clone()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs.values()), None)
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._step()
        load()
        graph.replay()
        same = float((self._drawn[0, 0] == plain).double().mean())
        if same < _SAME:
            raise RuntimeError(f"a captured step draws the plain step's token in {same:.0%} of the slots")
        return graph
