"""A key-value cache in which every row has its own slot and writes at its own position.

Token i of a sequence is in place i of its slot: there is no left padding, rows may be at different steps,
and a new row can take the slot of a finished one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qrpo_core.common.errors import EngineError

#: Name of `slot_attention` in transformers' registry.
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
    """Attention of one new token per slot on the CPU; anything else goes to transformers' sdpa attention.

    query [slots, heads, 1, dim], key and value [slots, kv heads, positions, dim] → [slots, 1, heads, dim].

    With torch's fused kernel the last digits depend on the thread that computes a row (buffers are aligned
    differently), so a row would depend on its slot. Batched float32 products do not have this problem.
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
        """Write one token to each slot, at the slot's position."""
        rows, places, visible = self._cache.rows, self._cache.places, self._cache.visible
        self.keys[rows, :, places] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, places] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.visible, 0


class SlotCache(Cache):  # type: ignore[misc]
    """A cache for `slots` sequences of up to `positions` tokens, with the layers and heads of `like`.

    On the CPU it is float32 for every dtype of the model (see `slot_attention`).

    places : [slots], the position of each slot's last token, which the next step writes.
    visible : so many first positions are read by a step; all of them on a CPU, where shapes are constant.
    """

    def __init__(self, like: Cache, slots: int, positions: int) -> None:
        self.slots, self.positions, self.visible = slots, positions, positions
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

    def place(self, slots: list[int], sequences: Cache, rows: list[int]) -> None:
        """Copy prefilled sequences into slots: row rows[i] of `sequences` into slots[i].

        What lies behind a sequence's end (padding) is written again before a step reads it.
        """
        to, taken = (torch.tensor(places, device=self.rows.device) for places in (slots, rows))
        for layer, filled in zip(self.layers, sequences.layers, strict=True):
            length = filled.keys.shape[2]
            layer.keys[to, :, :length] = filled.keys[taken].to(layer.keys.dtype)
            layer.values[to, :, :length] = filled.values[taken].to(layer.values.dtype)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [slots, 1, 1, visible]: a token sees the positions up to its own."""
        hidden = self._columns[None, : self.visible] > self.places[:, None]
        dtype = self._dtype or dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None, :]


def position_bytes(sequence: Cache) -> int:
    """Bytes of one token's keys and values in all layers."""
    both = [states for layer in sequence.layers for states in (layer.keys, layer.values)]
    return sum(states.shape[1] * states.shape[3] * states.element_size() for states in both)


def check_cache(sequence: Cache, length: int) -> None:
    """Raise EngineError unless the model keeps keys and values of all tokens, up to `length`."""
    for layer in sequence.layers:
        window = getattr(layer, "sliding_window", None)
        if not isinstance(layer, DynamicLayer):
            raise EngineError(
                f"a layer's cache is {type(layer).__name__}, not the keys and values of all tokens",
                remedy="use a model whose layers are all full attention",
            )
        if window is not None and length >= window:
            raise EngineError(
                f"a sequence of {length} tokens exceeds the model's attention window of {window}",
                remedy="lower sampling.max_new_tokens or shorten the prompt",
            )
