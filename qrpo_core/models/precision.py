"""The device to compute on, and the precision."""

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
    """Whether the device has instructions for bfloat16 matrix products.

    A CPU without AVX-512 or similar uses a plain loop, measured 7 to 30 times slower than float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if kind != "cpu" or not torch._C._has_mkldnn:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in for weights of `dtype`: float32 if bfloat16 is not native."""
    import torch

    if dtype == "bfloat16" and not native_bfloat16(device):
        return torch.float32
    wanted: torch.dtype = getattr(torch, dtype)
    return wanted


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def mixed_precision(
    precision: str | None, device: torch.device | str
) -> contextlib.AbstractContextManager[None]:
    """The trainer's precision: bfloat16 autocast, if that is native, for "bf16" and "bf16-weights"."""
    import torch

    if precision in ("bf16", "bf16-weights") and native_bfloat16(device):
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def careful_kernels() -> None:
    """Forbid CUDA two kernels in this process: sums of products in bfloat16, and cuDNN's attention.

    cuBLAS may cut a long sum into parts, and by torch's default it may round each part to bfloat16 before it
    adds them; whether it does depends on the number of rows. A row in a batch would then have larger errors
    than the same row alone. cuDNN's attention, which torch 2.11 prefers on an H100 where there is a mask,
    gives NaN in gradients at some lengths (PyTorch issue 196678).
    """
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
