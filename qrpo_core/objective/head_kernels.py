"""What is computed in a chunk of the output head: products with float32 results, and the pointwise part.

On a GPU the products of a chunk are fast, and reading and writing its [n, vocab] float32 logits costs as
much. So the pointwise part is two functions without side effects, which `compile_head` turns into one kernel
each; uncompiled they reuse the memory that they are given.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger("qrpo.head")

#: Rows of a rounded product that are computed at a time. A whole one, 57 MB for a vocabulary of 49,152 and a
#: width of 576, is memory that the system would clear for each chunk.
PRODUCT_ROWS = 4096

#: The compiled form of `statistics` and `probabilities`; empty until `compile_head`.
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


@dataclass(frozen=True)
class LogitRule:
    """What becomes of the products z of states and weight: logits c tanh(scale z / c) over the temperature.

    softcap : c, or None for scale z over the temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """d(logit)/dz, but for the softcap's slope."""
        return self.scale / self.temperature

    def logits(self, z: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """The logits [n, vocab] of products z, written to `out` where it is given (it may be z)."""
        if bias is not None:
            z = torch.add(z, bias.to(z.dtype), out=out)
        if self.softcap is not None:
            z = torch.tanh(torch.mul(z, self.scale / self.softcap, out=out), out=out)
            return torch.mul(z, self.softcap / self.temperature, out=out)
        return z if self.factor == 1 else torch.mul(z, self.factor, out=out)

    def slope(self, logits: Tensor) -> Tensor:
        """d(logit)/dz over `factor`: 1 - (logit temperature / c)^2. Only with a softcap."""
        assert self.softcap is not None
        return torch.mul(logits, self.temperature / self.softcap).square_().neg_().add_(1)


def statistics(
    z: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rule: LogitRule,
    out: Tensor | None = None,
    spare: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[label] and logsumexp(logits), both [n], of products z [n, vocab] and labels [n].

    out, spare : [n, vocab] to write to (out may be z), or None.
    """
    logits = rule.logits(z, bias, out)
    index = labels[:, None]
    chosen = torch.log_softmax(logits, dim=1, out=spare).gather(1, index)
    return chosen.squeeze(1), (logits.gather(1, index) - chosen).squeeze(1)


def probabilities(
    z: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    rule: LogitRule,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(logits), times the softcap's slope, in `dtype` [n, vocab]; out [n, vocab] may be z, or None."""
    logits = rule.logits(z, bias, out)
    slope = None if rule.softcap is None else rule.slope(logits)
    p = torch.exp(torch.sub(logits, logsumexp[:, None], out=out), out=out)
    return (p if slope is None else torch.mul(p, slope, out=out)).to(dtype)


def compile_head(backend: str = "inductor") -> None:
    """From now on `run` compiles the pointwise functions, in this process, at their first use.

    backend : of torch.compile. Log-probs change by the rounding of float32.
    """
    for function in (statistics, probabilities):
        _compiled[function] = torch.compile(function, backend=backend, fullgraph=True)


def uncompile_head() -> None:
    """Undo `compile_head`."""
    _compiled.clear()


def compiled(function: Callable[..., Any]) -> bool:
    """Whether `run` runs a function compiled, and so without the memory that it is given."""
    return function in _compiled


def run(function: Callable[..., Any], z: Tensor, *arguments: Any, **memory: Tensor | None) -> Any:
    """`statistics` or `probabilities`: compiled, or else uncompiled in the memory that is given.

    A function that cannot be compiled on this machine runs uncompiled from then on; the log says why.
    """
    if compiled(function):
        for tensor in (z, *arguments):
            if isinstance(tensor, Tensor) and len(tensor) == len(z):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one compilation for chunks of every size
        try:
            return _compiled[function](z, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways; an error of the function itself comes again
            _compiled.pop(function)
            _logger.warning("the head's %s runs uncompiled: %s", function.__name__, str(error)[:300])
    return function(z, *arguments, **memory)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right; out may be wider than the operands, and is then not rounded where torch can."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if wide_results(left.device.type, left.dtype):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right in total's dtype; total = left @ right if it is the first.

    Where the product is rounded first, PRODUCT_ROWS of it are in memory at a time.
    """
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif wide_results(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        for start in range(0, len(total), PRODUCT_ROWS):
            rows = slice(start, start + PRODUCT_ROWS)
            part = left[rows] @ right
            if first:
                total[rows] = part
            else:
                total[rows] += part


@functools.cache
def wide_results(device: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of `dtype` into float32 on this kind of device, summing in place.

    CUDA, since torch 2.10, whose addmm takes a float32 sum with `out_dtype`. Asked once by trying, because
    earlier versions accept some of the arguments and compute something else.
    """
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=total)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, beta=1, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 32).all())
