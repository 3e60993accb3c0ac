"""Log-probs of labels from hidden states, a chunk of states at a time; the backward computes logits again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrpo_core.objective.head_kernels import (
    PRODUCT_ROWS,
    LogitRule,
    add_product,
    compiled,
    probabilities,
    product,
    run,
    statistics,
    wide_results,
)

#: Bytes of a chunk on a CPU: 256 states with a bfloat16 vocabulary of 49,152. Chunks of 512 or 1024 are no
#: faster (1024 states, width 576, one core, forward and backward: 2.1 s with 256, 2.3 s with 512, 2.5 s with
#: 171).
CPU_CHUNK_BYTES = 120 << 20

#: The part of a GPU's memory that a chunk may take. The weight's gradient is read and written once a chunk,
#: so chunks are large: 1/32 of 80 GB are 2,400 states with a vocabulary of 128,256.
GPU_CHUNK_SHARE = 32

#: What a backward pass computes: nothing, the states' gradient only (a frozen head), or the weight's as well.
Gradients: TypeAlias = Literal["none", "states", "all"]


def chunk_bytes(device: torch.device) -> int:
    """Bytes of a chunk's [states, vocabulary] tensors on a device. Does not wait for the device."""
    if device.type != "cuda":
        return CPU_CHUNK_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // GPU_CHUNK_SHARE


def logit_bytes(dtype: torch.dtype, *, rounded: bool, softcap: bool) -> int:
    """Bytes that a chunk holds for each of its logits, at most, where products are computed in `dtype`.

    Forward: logits and log-softmax in float32, and the product before it is widened where it is rounded.
    Backward: logits (then probabilities) in float32, the softcap's slope, and the probabilities in `dtype`,
    which a CPU that rounds also stores transposed.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    narrow = dtype.itemsize if dtype.itemsize < wide else 0
    return max(2 * wide + rounded * narrow, wide + narrow + max(softcap * wide, rounded * narrow))


def even_chunks(states: int, at_most: int) -> list[slice]:
    """The fewest slices of range(states) of at most so many, of like size."""
    count = -(-states // at_most)
    size = -(-states // max(1, count))
    return [slice(start, min(start + size, states)) for start in range(0, states, max(1, size))]


def head_bytes(
    states: int,
    vocabulary: int,
    dim: int,
    *,
    weights: torch.dtype,
    products: torch.dtype,
    gradients: Gradients,
    chunk: int,
    rounded: bool = False,
    softcap: bool = False,
) -> int:
    """Bytes that the head adds to a device's memory at its peak, without its weight, states and inputs.

    Parameters
    ----------
    states : of a pass, those that predict a completion token. vocabulary, dim : of the head's weight.
    weights, products : dtype of the weight, and of the matrix products (bfloat16 under autocast).
    chunk : bytes of a chunk: `chunk_bytes`, or on a GPU its memory // GPU_CHUNK_SHARE.
    rounded : whether products are rounded to `products`; so on a CPU, not on CUDA with torch >= 2.10.

    Compiled kernels (`compile_head`) stay below: they hold no log-softmax.
    """
    a_state = vocabulary * logit_bytes(products, rounded=rounded, softcap=softcap)
    chunks = even_chunks(states, max(1, chunk // a_state))
    size = chunks[0].stop if chunks else 0
    wide = torch.promote_types(products, torch.float32).itemsize
    narrow = products.itemsize if products.itemsize < wide else 0
    weight = vocabulary * dim
    always = 2 * states * wide + (weight * products.itemsize if weights != products else 0)
    forward = size * (vocabulary * (2 * wide + rounded * narrow) + dim * narrow)
    if gradients == "none":
        return always + forward
    after = narrow + max(softcap * wide, rounded * narrow)
    backward = states * dim * weights.itemsize
    backward += size * (vocabulary * (wide + after) + dim * (narrow + wide))
    if gradients == "all":
        if len(chunks) == 1 and weights == products:
            backward += weight * products.itemsize
        else:
            lower = weights.itemsize if weights.itemsize < wide else 0
            # A rounded product is added in parts; a gradient narrower than its sum is rounded at the end.
            part = min(vocabulary, PRODUCT_ROWS) * dim * rounded * narrow
            backward += weight * wide + max(part, weight * lower)
    return always + max(forward, backward)


@dataclass(frozen=True)
class Head:
    """How states become logits.

    rule : from products to logits. dtype : of the products' operands. chunk : states at a time, at most; None
        takes as many as `chunk_bytes` holds.
    """

    rule: LogitRule
    dtype: torch.dtype
    chunk: int | None = None

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of logits and sums: float32, or float64 for float64 products."""
        return torch.promote_types(self.dtype, torch.float32)

    def chunks(self, states: Tensor, weight: Tensor) -> list[slice]:
        """The rows of `states` that are projected together."""
        chunk = self.chunk
        if chunk is None:
            rounded = self.dtype != self.sum_dtype and not wide_results(states.device.type, self.dtype)
            a_logit = logit_bytes(self.dtype, rounded=rounded, softcap=self.rule.softcap is not None)
            chunk = max(1, chunk_bytes(states.device) // (a_logit * len(weight)))
        return even_chunks(len(states), chunk)

    def memory(self, chunks: list[slice], weight: Tensor) -> Tensor:
        """Memory for a chunk's logits, [states, vocab]: fresh pages cost a CPU as much as the softmax."""
        size = chunks[0].stop if chunks else 0
        return torch.empty(size, len(weight), dtype=self.sum_dtype, device=weight.device)

    def gradient_like(self, parameter: Tensor, chunks: list[slice]) -> Tensor:
        """Memory for a parameter's gradient: float32, or the parameter's dtype if one product makes it."""
        if not chunks:
            return torch.zeros_like(parameter)
        alone = len(chunks) == 1 and parameter.dtype == self.dtype
        return torch.empty_like(parameter, dtype=self.dtype if alone else self.sum_dtype)


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(logits)[label] of states [n, dim]; the backward pass computes the logits again.

    With p = softmax(logits), g the incoming gradient of a row and z = states @ weight.T, d(loss)/dz is
    g (onehot - p) scale / temperature, times the softcap's slope. A row's factors are put on the [n, dim]
    side of both products. p comes from the logsumexp of the forward pass, without another reduction.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
    ) -> Tensor:
        logprobs = torch.empty(len(states), dtype=head.sum_dtype, device=states.device)
        logsumexp = torch.empty_like(logprobs)
        chunks = head.chunks(states, weight)
        memory = head.memory(chunks, weight)
        spare = None if compiled(statistics) else head.memory(chunks, weight)
        with torch.autocast(states.device.type, enabled=False):
            low = weight.to(head.dtype)
            for part in chunks:
                own = states[part].to(head.dtype)
                z = product(own, low.t(), memory[: len(own)])
                room = None if spare is None else spare[: len(own)]
                logprobs[part], logsumexp[part] = run(
                    statistics, z, bias, labels[part], head.rule, out=z, spare=room
                )
        ctx.save_for_backward(states, weight, bias, labels, logprobs, logsumexp)
        ctx.head = head
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels, logprobs, logsumexp = ctx.saved_tensors
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        head: Head = ctx.head
        chunks = head.chunks(states, weight)
        grad_states = torch.empty_like(states) if need_states else None
        grad_weight = head.gradient_like(weight, chunks) if need_weight else None
        grad_bias = head.gradient_like(bias, chunks) if need_bias else None
        memory = head.memory(chunks, weight)
        with torch.autocast(states.device.type, enabled=False):
            low = weight.to(head.dtype)
            factors = (grad * -head.rule.factor)[:, None]
            at_label = torch.expm1(logprobs)  # p - 1 without cancellation
            if head.rule.softcap is not None:
                at_label *= head.rule.slope(logprobs + logsumexp)
            for place, part in enumerate(chunks):
                factor, own = factors[part], states[part]
                z = product(own.to(head.dtype), low.t(), memory[: len(own)])
                error = run(probabilities, z, bias, logsumexp[part], head.rule, head.dtype, out=z)
                error.scatter_(1, labels[part, None], at_label[part, None].to(error.dtype))
                if grad_states is not None:
                    pulled = product(error, low, torch.empty_like(own, dtype=head.sum_dtype))
                    grad_states[part] = pulled.mul_(factor)
                if grad_weight is not None:
                    add_product(grad_weight, error.t(), (factor * own).to(head.dtype), first=place == 0)
                if grad_bias is not None:
                    add_product(grad_bias[:, None], error.t(), factor.to(head.dtype), first=place == 0)
                del error  # before the next chunk's
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )
