"""Where to compute and in which precision."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pick_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices itself.

    A CPU without AVX512 (or its like) does it in a plain loop, measured 7 to 30 times slower than float32:
    there, float32 is faster and more precise.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if kind != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """The dtype in which weights of `dtype` are multiplied: float32 where bfloat16 is not native."""
    import torch

    if dtype == "bfloat16" and not native_bfloat16(device):
        return torch.float32
    wanted: torch.dtype = getattr(torch, dtype)
    return wanted


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def mixed_precision(
    precision: str | None, device: torch.device | str
) -> contextlib.AbstractContextManager[None]:
    """The trainer's arithmetic: bfloat16 autocast for "bf16" where that is native, else nothing."""
    import torch

    if precision == "bf16" and native_bfloat16(device):
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
