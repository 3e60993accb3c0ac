"""torch's variable-length flash attention on the segments of a packed row."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qrpo_core.data.packing import Segments

try:
    from torch.nn.attention import varlen as _module

    varlen_attn: Any = _module.varlen_attn
    _PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # torch before 2.10
    varlen_attn, _PARAMETERS = None, frozenset()

#: Whether this torch has the function with the parameters that are used here (2.11 and later).
VARLEN = {"scale", "window_size"} <= _PARAMETERS


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    function: Any = varlen_attn,
) -> torch.Tensor:
    """One kernel for all segments, in float16 or bfloat16; shapes as in `packed_attention`.

    The kernel's causal mask is aligned to the lower right, so a completion behind a shared prefix sees all of
    it. Its window counts the tokens before a token, ours that token too. It takes fewer kv heads than heads;
    from torch 2.13 on it wants to be told.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    options = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS and q.shape[1] != k.shape[1] else {}
    output: torch.Tensor = function(
        q,
        k,
        v,
        segments.query_starts,
        segments.key_starts,
        segments.longest_query,
        segments.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return output[None]
