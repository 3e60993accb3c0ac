"""float32 values as a bfloat16 value and the 16 bits that it lacks, and models with bfloat16 matrices.

A model computes with the bfloat16 half; the pair is the exact float32 value, in 4 bytes. Training changes the
pair (training/master_weights.py), so no update is lost.

Values are rounded up above thresholds that are spread evenly over the rows and columns of a matrix. Rounding
to the nearest would hide most of a training from its own loss: the weights of published models lie on the
bfloat16 grid, and an update of a hundredth of a grid step would change none of them. Spread thresholds let it
change one weight in a hundred, by a whole grid step, so that sums over many weights are right. A
threshold follows from row and column, so nothing about it is stored.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: 2**16 over g and g squared, where g**3 = g + 1 (1.3247...): multiples of the two, added modulo 2**16, are
#: spread evenly over any part of a plane.
_COLUMN_STRIDE, _ROW_STRIDE = 49471, 37345
#: The threshold of the first value: rounding to the nearest.
_MIDDLE = 1 << 15


def split_float32(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bfloat16 values, int16 low bits) of float32 values [..., columns], of the same shape.

    Values on the bfloat16 grid, infinities and NaN stay as they are.
    """
    import torch

    rows = values.detach().clone(memory_format=torch.contiguous_format).view(-1, values.shape[-1])
    weight = torch.empty_like(rows, dtype=torch.bfloat16)
    low = torch.empty_like(rows, dtype=torch.int16)
    split_into(rows, weight, low)
    return weight.view(values.shape), low.view(values.shape)


def split_into(values: torch.Tensor, weight: torch.Tensor, low: torch.Tensor, first_row: int = 0) -> None:
    """Write the halves of float32 values [rows, columns] to `weight` and `low`.

    It overwrites `values`, which is contiguous. first_row : the place of its first row in the matrix, whose
    leading dimensions count as one.
    """
    import torch

    bits = values.view(torch.int32).add_(_thresholds(values, first_row))
    halves = bits.view(torch.int16).view(*values.shape, 2)  # the lower half comes first: little-endian
    low.copy_(halves[..., 0])
    weight.view(torch.int16).copy_(halves[..., 1])


def join_float32(weight: torch.Tensor, low: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """The float32 values whose halves these are, bit for bit. first_row : as in `split_into`."""
    import torch

    halves = torch.empty(
        weight.numel() // weight.shape[-1], weight.shape[-1], 2, dtype=torch.int16, device=weight.device
    )
    halves[..., 0] = low.view(halves.shape[:2])
    halves[..., 1] = weight.view(torch.int16).view(halves.shape[:2])
    bits = halves.view(torch.int32).squeeze(-1)
    return bits.sub_(_thresholds(bits, first_row)).view(torch.float32).view(weight.shape)


def _thresholds(like: torch.Tensor, first_row: int) -> torch.Tensor:
    """2**16 minus the share of a grid step, in 2**-16, from which each value is rounded up; int32."""
    rows, columns = like.shape
    by_row = _multiples(_ROW_STRIDE, first_row, rows, like.device)
    by_column = _multiples(_COLUMN_STRIDE, 0, columns, like.device)
    return (by_row[:, None] + by_column).bitwise_and_(0xFFFF)


@functools.lru_cache(maxsize=256)
def _multiples(stride: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Multiples of a stride, modulo 2**16; int32 [count]. Those of columns begin in the middle."""
    import torch

    places = torch.arange(first, first + count, dtype=torch.int64, device=device)
    middle = _MIDDLE if stride == _COLUMN_STRIDE else 0
    return ((places * stride + middle) & 0xFFFF).to(torch.int32)


def round_matrices(model: Any, *, trained: bool | None = None) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Replace a model's float32 matrices by their bfloat16 halves; return the low bits of each.

    trained : only matrices that need gradients (True) or need none (False); None takes all. Vectors, such as
        the weights of norms, stay float32.

    Embeddings are returned in float32, so that under bfloat16 autocast the arithmetic is that of float32
    weights: products in bfloat16, sums of layers and norms in float32. It needs autocast.
    """
    import torch

    found: dict[torch.nn.Parameter, torch.Tensor] = {}
    for parameter in model.parameters():
        wanted = trained is None or parameter.requires_grad == trained
        if wanted and parameter.dim() > 1 and parameter.dtype == torch.float32:
            parameter.data, found[parameter] = split_float32(parameter.data)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(_as_float32)
    return found


def _as_float32(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
