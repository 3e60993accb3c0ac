"""A key-value cache in which every row has its own slot and writes at its own position.

Position i of a sequence lies in place i of its slot: nothing is padded on the left, rows of one table may
be at different steps, and a finished row's slot is taken by the next one. Loaded only by engines/hf.py.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qrpo_core.errors import EngineError

#: Name under which `slot_attention` is known to transformers.
ATTENTION = "qrpo_slots"


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one new token a slot on the CPU; everything else goes to transformers' sdpa attention.

    torch's fused kernel gives a row other last digits when another thread computes it (its buffers are
    aligned differently), so a row would depend on its slot. Batched float32 products do not.
    query [slots, heads, 1, dim], key and value [slots, kv heads, positions, dim] → [slots, 1, heads, dim].
    """
    if query.shape[2] != 1 or query.device.type != "cpu" or attention_mask is None:
        answer: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return answer
    slots, heads, _, dim = query.shape
    grouped = query.reshape(slots, key.shape[1], heads // key.shape[1], dim).float()
    with torch.autocast("cpu", enabled=False):
        scores = torch.matmul(grouped * (dim**-0.5 if scaling is None else scaling), key.transpose(2, 3))
        weights = torch.softmax(scores + attention_mask, dim=-1)
        mixed = torch.matmul(weights, value)
    return mixed.reshape(slots, 1, heads, value.shape[-1]).to(query.dtype), None


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a `SlotCache`: keys and values [slots, kv heads, positions, dim]."""

    def __init__(self, cache: SlotCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._cache = cache
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a slot, each at its slot's position."""
        rows, places = self._cache.rows, self._cache.places
        self.keys[rows, :, places] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, places] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.positions, 0


class SlotCache(Cache):  # type: ignore[misc]
    """`slots` sequences of up to `positions` tokens, shaped like the cache of one sequence that was read.

    On the CPU it is float32 whatever the model's dtype (see `slot_attention`).
    """

    def __init__(self, like: Cache, slots: int, positions: int) -> None:
        self.slots, self.positions = slots, positions
        first = like.layers[0].keys
        self.rows = torch.arange(slots, device=first.device)
        self.places = torch.zeros_like(self.rows)
        self._columns = torch.arange(positions, device=first.device)
        self._dtype = torch.float32 if first.device.type == "cpu" else None
        super().__init__(layers=[self._layer(layer) for layer in like.layers])

    def _layer(self, layer: Any) -> _SlotLayer:
        def empty(states: torch.Tensor) -> torch.Tensor:
            _, heads, _, dim = states.shape
            dtype = self._dtype or states.dtype
            return torch.zeros(self.slots, heads, self.positions, dim, dtype=dtype, device=states.device)

        return _SlotLayer(self, empty(layer.keys), empty(layer.values))

    def place(self, slot: int, sequence: Cache) -> None:
        """Copy a sequence that was read, a cache of batch one, into a slot."""
        for mine, read in zip(self.layers, sequence.layers, strict=True):
            mine.keys[slot, :, : read.keys.shape[2]] = read.keys[0]
            mine.values[slot, :, : read.values.shape[2]] = read.values[0]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [slots, 1, 1, positions]: a slot sees the places up to its own."""
        hidden = self._columns[None, :] > self.places[:, None]
        dtype = self._dtype or dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None, :]


def check_cache(sequence: Cache, length: int) -> None:
    """Refuse models whose cache is no list of keys and values up to `length` tokens. Raises EngineError."""
    for layer in sequence.layers:
        window = getattr(layer, "sliding_window", None)
        if not isinstance(layer, DynamicLayer):
            raise EngineError(
                f"a layer keeps {type(layer).__name__}, not keys and values of every token",
                remedy="use a model with attention layers only",
            )
        if window is not None and length >= window:
            raise EngineError(
                f"a sequence of {length} tokens reaches the model's attention window of {window}",
                remedy="lower sampling.max_new_tokens or shorten the prompt",
            )
