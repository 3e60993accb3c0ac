"""Log-probs of tokens from hidden states, without [tokens, vocabulary] logits in memory.

log_softmax(states @ weight.T) keeps several [tokens, vocab] float32 tensors: for a small model that is most
of the memory of a training step. Here states are projected a chunk at a time, and the backward pass computes
each chunk again. Callers give only the states that predict a completion token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.chunked_head import ChunkedLogprobs, Head
from qrpo_core.objective.head_kernels import LogitRule


def label_logprobs(
    states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    lm_head_bias: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(label) of each hidden state, [n] in nats, without logits of all of them in memory.

    Parameters
    ----------
    states : [n, dim], last hidden states (after the final norm) of the positions that predict `labels`.
    lm_head_weight : [vocab, dim], tied to the embedding or not. lm_head_bias : [vocab].
    labels : [n], token ids.
    chunk_tokens : states projected at a time; None takes as many as the device's memory suggests.
    logit_scale, logit_softcap : logits z (bias included) become c tanh(scale z / c), or scale z without a
        softcap c.
    temperature : pi is softmax(logits / temperature), the policy as it is sampled at that temperature.

    Returns
    -------
    Float32 (float64 from float64 inputs). The log-softmax is float32 at any dtype of the model: a bfloat16
    sum near -400 has a grid of 2 nats (docs/reference/method.md, section 8). Under autocast, or with bfloat16
    weights, the projection itself is in that dtype, as without chunks.

    Raises
    ------
    ObjectiveError : shapes that do not fit, chunk_tokens < 1, logit_softcap or temperature not above 0.
    """
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise ObjectiveError(
            f"states {list(states.shape)} must be [n, dim] and labels {list(labels.shape)} [n]"
        )
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != states.shape[1]:
        raise ObjectiveError(
            f"lm_head_weight {list(lm_head_weight.shape)} must be [vocab, {states.shape[1]}]"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ObjectiveError(f"chunk_tokens must be >= 1 or None, got {chunk_tokens}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ObjectiveError(f"logit_softcap must be > 0 or None, got {logit_softcap}")
    if not 0 < temperature < math.inf:
        raise ObjectiveError(f"temperature must be a number above 0, got {temperature}")
    rule = LogitRule(float(logit_scale), logit_softcap, float(temperature))
    head = Head(rule, _projection_dtype(states, lm_head_weight), chunk_tokens)
    values: Tensor = ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        states, lm_head_weight, lm_head_bias, labels, head
    )
    return values


def _projection_dtype(states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `torch.nn.functional.linear` would multiply here."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(states.dtype, weight.dtype)
