"""Check that a model keeps the texts of a packed row apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qrpo_core.common.errors import ModelError
from qrpo_core.data.packing import pack
from qrpo_core.models.forward import causal_model, checking, token_logprobs
from qrpo_core.models.packed_attention import set_attention, watch_windows

#: Kinds of layers that a packed row keeps apart. Others carry a state along the row, or hide tokens by a mask
#: of which attention is not told.
_KINDS = frozenset({"full_attention", "sliding_attention"})

#: Roundings of the largest log-prob by which a packed row may differ from separate ones: layers add up
#: thousands of products, in another order. A text that sees another one differs by far more.
_ROUNDINGS = {torch.float32: 1024, torch.float64: 1024}
_FEW_ROUNDINGS = 16

#: Tokens of a prompt and of a completion, at most.
_TOKENS = 16

_REMEDY = "use a model whose layers are all attention over the tokens before, full or with a sliding window"


def check_packing(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> None:
    """Raise ModelError if log-probs of packed rows differ from those of each row alone.

    prompt, completion : tokens of a real row. Three short rows are made of them, two with a shared prompt.
    They are compared with each row alone in transformers' eager attention; without autocast and dropout.
    """
    inner = causal_model(model)
    name, config = type(inner).__name__, inner.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    strange = sorted(set(kinds) - _KINDS)
    if strange:
        raise ModelError(
            f"{name} has layers of kind {', '.join(strange)}, which cannot be packed", remedy=_REMEDY
        )
    first, rest = list(prompt[:_TOKENS]), list(completion[:_TOKENS]) or list(prompt[:_TOKENS])
    prompts, completions = [first, [*first[::-1], first[0]], first], [rest, rest, rest[::-1]]
    weight = inner.get_input_embeddings().weight
    device = weight.device
    packed = pack(prompts, completions).to(device)
    with checking(model):
        with watch_windows() as seen:
            ours = token_logprobs(model, packed).float()
        _check_windows(name, config, seen)
        alone = [_alone(model, *row, device) for row in zip(prompts, completions, strict=True)]
    theirs = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    if not theirs.isfinite().all():
        return  # damaged weights, which is another error
    difference = float((ours - theirs).abs().max())
    rounding = _ROUNDINGS.get(weight.dtype, _FEW_ROUNDINGS) * torch.finfo(weight.dtype).eps
    if not difference <= rounding * max(1.0, float(theirs.abs().max())):
        raise ModelError(
            f"{name} does not keep packed rows apart: a token's log-prob differs by {difference:.3g} nats "
            "from that of its row alone",
            remedy=_REMEDY,
        )


def _check_windows(name: str, config: Any, seen: Sequence[tuple[Any, int | None]]) -> None:
    """Raise ModelError if a layer has a window that only its mask knows."""
    kinds = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) is not None
    for module, window in seen:
        place = getattr(module, "layer_idx", None)
        has_one = kinds[place] == "sliding_attention" if kinds and place is not None else windowed
        if has_one and window is None:
            raise ModelError(
                f"a layer of {name} has a sliding window that its attention is not told", remedy=_REMEDY
            )


def _alone(
    model: Any, prompt: Sequence[int], completion: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Log-probs of a completion's tokens, float32 [tokens], by the model's own forward and attention."""
    inner = causal_model(model)
    before = getattr(inner.config, "_attn_implementation", "eager")
    ids = torch.tensor([[*prompt, *completion]], device=device)
    set_attention(inner, "eager")
    try:
        logits = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)["logits"]
    finally:
        set_attention(inner, before)
    values = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    found: torch.Tensor = values.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return found
