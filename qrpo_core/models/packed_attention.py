"""Attention of packed rows, as an attention implementation of transformers.

The segments of a row travel as the keyword `segments` of the model's forward, which transformers hands to the
attention of every layer. On CUDA one call of torch's variable-length flash attention computes a layer. On a
CPU, in float32, and where that kernel lacks something, a loop over the segments does.
docs/adr/0010-packed-passes.md says why.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qrpo_core.common.errors import ModelError
from qrpo_core.data.packing import Segments, pack
from qrpo_core.models.varlen import VARLEN, varlen

#: Name of `packed_attention` in transformers' registry.
ATTENTION = "qrpo_packed"

#: Arguments that layers hand to their attention and that change nothing in a forward without a cache.
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
    | {"output_router_logits", "num_items_in_batch", "is_causal", "position_embeddings"}
)

_logger = logging.getLogger("qrpo.policy")

#: Whether flash attention gave the loop's results on this machine; None before `flash_agrees` has tried.
_flash: bool | None = None

#: The layers' attention modules and their windows, while `watch_windows` watches.
_watched: list[tuple[Any, int | None]] | None = None


def packed_mask(device: torch.device) -> torch.Tensor:
    """A mask [1, 1, 1, 1] that marks a packed row.

    transformers hands a mask of four dimensions to every layer as it is. So it builds no mask of its own,
    which would cost [tokens, tokens] and a synchronisation with the device.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention within the segments of a packed row; without segments, transformers' sdpa attention.

    query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim] → [1, tokens, heads, dim].

    Raises ModelError for a packed row without segments (the model does not hand keywords on) and for
    arguments that are not known here, such as attention sinks.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise ModelError(
                f"{type(module).__name__} does not get the segments of a packed row",
                remedy="use another model",
            )
        answer: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, **kwargs
        )
        return answer
    unknown = [name for name, given in kwargs.items() if name not in _HARMLESS and _says_something(given)]
    if unknown or kwargs.get("is_causal") is False:
        raise ModelError(
            f"{type(module).__name__} attends with {', '.join(unknown) or 'is_causal=False'}, "
            "which packed rows do not know",
            remedy="use another model",
        )
    if _watched is not None:
        _watched.append((module, sliding_window))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = _flash_dtype(query, value) if softcap is None and dropout == 0 else None
    if dtype is not None:
        q, k, v = (states.to(dtype) for states in (query, key, value))
        return varlen(q, k, v, segments, scale, sliding_window), None
    return attend_by_segments(query, key, value, segments, scale, sliding_window, softcap, dropout), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _says_something(given: Any) -> bool:
    return given is not None and given is not False


def _flash_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype | None:
    """The precision in which flash attention can compute this; None if it cannot.

    Under autocast, queries and keys come out of the rotary embedding in float32.
    """
    if query.device.type != "cuda" or not _flash:
        return None
    dim = query.shape[-1]
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    fits = dim % 8 == 0 and dim <= 256 and value.shape[-1] == dim
    return dtype if fits and dtype in (torch.float16, torch.bfloat16) else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One attention a segment: shapes as in `packed_attention`. window : a token sees that many, itself too.

    Keys and values are split, not sliced: the gradient of a slice is a whole row of zeros for each segment.
    """
    queries, keys, values = (torch.split(states, [*segments.lengths], 2) for states in (query, key, value))
    outputs = []
    for number, prefix in enumerate(segments.prefixes):
        k, v = keys[number], values[number]
        if prefix >= 0:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        outputs.append(_attend(queries[number], k, v, scale, window, softcap, dropout).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention of a segment, whose last query is its last key."""
    rows, columns, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    plain = window is None or window >= columns
    if softcap is None and plain and (rows == columns or rows == 1):
        return scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=rows > 1, scale=scale, enable_gqa=grouped
        )
    own = torch.arange(columns - rows, columns, device=q.device)[:, None]
    others = torch.arange(columns, device=q.device)
    seen = others <= own
    if window is not None:
        seen &= others > own - window
    if softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return drop(weights, dropout) @ v


@contextlib.contextmanager
def watch_windows() -> Iterator[list[tuple[Any, int | None]]]:
    """Collect the attention module and the window of every call on a packed row."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def use_packed_attention(inner: Any) -> None:
    """Let a model attend in packed rows from now on; forwards without segments attend as with sdpa."""
    if getattr(inner.config, "_attn_implementation", None) != ATTENTION:
        flash_agrees(next(inner.parameters()).device)
        set_attention(inner, ATTENTION)


def set_attention(inner: Any, name: str) -> None:
    """Set the attention implementation of a model, wrapped by FSDP2 or not.

    transformers' own `set_attn_implementation` looks at a class's source file, which FSDP2's classes lack.
    Neither name is written into a saved config.
    """
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def flash_agrees(device: torch.device) -> bool:
    """Whether flash attention gives the loop's results and gradients on this machine; tried once.

    If not, a warning says so and the loop is used.
    """
    global _flash
    if device.type != "cuda" or _flash is not None:
        return bool(_flash)
    _flash = VARLEN and torch.cuda.get_device_capability(device) >= (8, 0)
    if _flash:
        try:
            _flash = _compare_flash(device)
            reason = "gives other results than torch's attention"
        except (RuntimeError, TypeError, ValueError) as error:
            _flash, reason = (
                False,
                f"fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            )
        if not _flash:
            _logger.warning("variable-length flash attention %s; a loop over sequences is used", reason)
    return _flash


def _compare_flash(device: torch.device) -> bool:
    """Compare in bfloat16 on a small packed row, with a shared prefix, fewer kv heads and a window."""
    segments = pack([[1] * 70, [1] * 70, [2] * 9], [[3] * 150, [4] * 3, [5] * 200]).to(device).segments
    total = sum(segments.lengths)
    noise = torch.Generator(device).manual_seed(0)
    draw = [torch.randn(1, h, total, 64, device=device, generator=noise) for h in (4, 2, 2, 4)]
    weights = draw.pop().transpose(1, 2)
    for window in (None, 40):
        found = []
        functions: tuple[Any, ...] = (varlen, attend_by_segments)
        for function in functions:
            inputs = [states.bfloat16().requires_grad_() for states in draw]
            with torch.enable_grad(), torch.autocast("cuda", enabled=False):
                q, k, v = inputs
                output: torch.Tensor = function(q, k, v, segments, 0.125, window)
                gradients = torch.autograd.grad((output.float() * weights).sum(), inputs)
            found.append([output, *gradients])
        for ours, theirs in zip(*found, strict=True):
            # Each is a sum in bfloat16, in another order: a few roundings of the largest.
            limit = 8 * torch.finfo(torch.bfloat16).eps * float(theirs.float().abs().max())
            if not float((ours.float() - theirs.float()).abs().max()) <= limit:
                return False
    return True
