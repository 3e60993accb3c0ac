"""Completion log-probs from hidden states, without ever holding [tokens, vocabulary] logits.

The plain way, logits = hidden @ weight.T and log_softmax over all positions, keeps several [batch, length,
vocab] float32 tensors: for a small model that is most of the memory of a training step. Here only positions
that predict a completion token are projected, a chunk at a time, and each chunk is computed again in the
backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrpo_core.errors import ObjectiveError

CHUNK_TOKENS = 1024


def completion_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    lm_head_bias: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(y|x): the sum of completion token log-probs of each sequence, [batch], in nats.

    Parameters
    ----------
    hidden : [batch, length, dim], the model's last hidden states (after its final norm).
    lm_head_weight : [vocab, dim], tied to the embedding or not. lm_head_bias : [vocab].
    token_ids : [batch, length], the input ids that `hidden` was computed from.
    mask : [batch, length], true (1) where token_ids[:, t] is a completion token; it is predicted from
        hidden[:, t - 1]. mask[:, 0] must be false: nothing predicts the first token.
    chunk_tokens : positions projected at a time. It sets the memory, [chunk_tokens, vocab] twice.
    logit_scale, logit_softcap : logits z (bias included) become c tanh(scale z / c), or scale z without a
        softcap c.
    temperature : pi is softmax(logits / temperature), the policy as it is sampled at that temperature.

    Returns
    -------
    Float32 (float64 from float64 inputs). log-softmax and sums are float32 whatever the model's dtype: a
    bfloat16 sum near -400 has a grid of 2 nats (method.md section 8). Under autocast, or with bfloat16
    weights, the projection itself is in that dtype, as in the plain way. A row without completion gives 0.

    Raises
    ------
    ObjectiveError : shapes that do not fit, mask[:, 0] true, chunk_tokens < 1, logit_softcap or temperature
        not above 0.
    """
    return completion_token_logprobs(
        hidden,
        lm_head_weight,
        token_ids,
        mask,
        lm_head_bias,
        chunk_tokens,
        logit_scale,
        logit_softcap,
        temperature,
    ).sum(dim=1)


def completion_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    lm_head_bias: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(y_t | x, y_<t) of each completion token, [batch, length], 0 where mask is false.

    Entry [:, t] belongs to token_ids[:, t]. Arguments, dtype and errors as `completion_logprobs`.
    """
    predicted = _check(hidden, lm_head_weight, token_ids, mask)
    if chunk_tokens < 1 or (logit_softcap is not None and not logit_softcap > 0):
        raise ObjectiveError(
            f"chunk_tokens must be >= 1 and logit_softcap > 0 or None, got {chunk_tokens} and {logit_softcap}"
        )
    if not 0 < temperature < math.inf:
        raise ObjectiveError(f"temperature must be a number above 0, got {temperature}")
    positions = predicted.flatten().nonzero().squeeze(1)
    # hidden[:, t - 1] predicts token t: with mask[:, 0] false, position - 1 never leaves the row.
    states = hidden.flatten(0, 1).index_select(0, positions - 1)
    labels = token_ids.flatten().index_select(0, positions)
    dtype = _projection_dtype(hidden, lm_head_weight)
    head = _Head(chunk_tokens, float(logit_scale), logit_softcap, float(temperature), dtype)
    values: Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        states, lm_head_weight, lm_head_bias, labels, head
    )
    flat = torch.zeros(predicted.numel(), dtype=values.dtype, device=values.device)
    return flat.index_copy(0, positions, values).view(predicted.shape)


def _check(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    if hidden.ndim != 3 or token_ids.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        raise ObjectiveError(
            f"hidden {list(hidden.shape)} must be [batch, length, dim], "
            f"token_ids {list(token_ids.shape)} and mask {list(mask.shape)} [batch, length]"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ObjectiveError(f"lm_head_weight {list(weight.shape)} must be [vocab, {hidden.shape[2]}]")
    predicted = mask.bool()
    if predicted[:, :1].any():
        raise ObjectiveError(
            "mask marks the first token of a sequence, which nothing predicts",
            remedy="mask completion tokens in token_ids' own positions; do not shift the mask",
        )
    return predicted


def _projection_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `torch.nn.functional.linear` would multiply here."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


@dataclass(frozen=True)
class _Head:
    """How states become logits, besides the weights."""

    chunk: int
    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def logits(
        self, states: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, scaled states [n, dim], logits over temperature [n, vocab], spare [n, vocab]) by chunks.

        The [n, vocab] memory is allocated once: fresh pages cost a CPU as much as the softmax itself.
        """
        shape = (min(self.chunk, len(states)), len(weight))
        wide, spare = torch.empty((2, *shape), dtype=self.sum_dtype, device=states.device)
        same = self.dtype == self.sum_dtype
        product = wide if same else torch.empty(shape, dtype=self.dtype, device=states.device)
        for start in range(0, len(states), self.chunk):
            part = slice(start, min(start + self.chunk, len(states)))
            n = part.stop - part.start
            scaled = states[part].to(self.dtype) * self.scale
            torch.mm(scaled, weight.t(), out=product[:n])
            logits = wide[:n]
            if product is not wide:
                logits.copy_(product[:n])
            if bias is not None:
                logits += bias.to(self.sum_dtype) * self.scale
            if self.softcap is not None:
                logits.div_(self.softcap).tanh_().mul_(self.softcap)
            if self.temperature != 1:
                logits.div_(self.temperature)
            yield part, scaled, logits, spare[:n]


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(states @ weight.T)[labels], rows [n]; the backward pass computes the logits again.

    With p = softmax(logits / T) and g the incoming gradient of a row, d(logits) = g (onehot - p) / T. It is
    never formed: g / T is put on the [n, dim] side of both products, and the one-hot part is a row of the
    weight.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head
    ) -> Tensor:
        ctx.save_for_backward(states, weight, bias, labels)
        ctx.head = head
        out = torch.empty(len(states), dtype=head.sum_dtype, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for part, _, logits, spare in head.logits(states, weight.to(head.dtype), bias):
                torch.log_softmax(logits, dim=1, out=spare)
                out[part] = spare.gather(1, labels[part, None]).squeeze(1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels = ctx.saved_tensors
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        head: _Head = ctx.head
        grad_states = torch.empty_like(states) if need_states else None
        grad_weight = torch.zeros_like(weight, dtype=head.sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.sum_dtype) if need_bias else None
        with torch.autocast(states.device.type, enabled=False):
            low = weight.to(head.dtype)
            pull = _fast_right_operand(low) if need_states else low
            for part, scaled, logits, p in head.logits(states, low, bias):
                label, row = labels[part], grad[part, None] / head.temperature
                torch.softmax(logits, dim=1, out=p)
                hit = row
                if head.softcap is not None:  # d/dz of c tanh(z/c) is 1 - (logit/c)^2
                    slope = 1 - (logits * (head.temperature / head.softcap)).square()
                    hit = row * slope.gather(1, label[:, None])
                    p *= slope
                p_low = p.to(head.dtype)
                if grad_states is not None:
                    pulled = hit * low[label] - row * (p_low @ pull)
                    grad_states[part] = (pulled * head.scale).to(states.dtype)
                if grad_weight is not None:
                    _subtract_product(grad_weight, p_low, (row * scaled).to(head.dtype))
                    grad_weight.index_add_(0, label, (hit * scaled).to(head.sum_dtype))
                if grad_bias is not None:
                    grad_bias -= head.scale * (p.t() @ row.squeeze(1))
                    grad_bias.index_add_(0, label, head.scale * hit.squeeze(1))
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _fast_right_operand(weight: Tensor) -> Tensor:
    """The same [vocab, dim] matrix, stored column by column where that makes p @ weight fast.

    Without native bfloat16 instructions a CPU takes 8 times as long with the row-major operand (measured:
    256 x 4096 x 576, 0.91 s against 0.12 s on AVX2); float32 and GPUs do not care, and are spared the copy.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return weight.t().contiguous().t()
    return weight


def _subtract_product(total: Tensor, p: Tensor, states: Tensor) -> None:
    """total -= p.T @ states, summed over chunks in float32 also where the product is bfloat16."""
    if total.dtype == p.dtype:
        total.addmm_(p.t(), states, alpha=-1)
    else:
        total -= p.t() @ states
