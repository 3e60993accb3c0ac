"""The C library's heap, where a CPU has its tensors: what is free in it still belongs to the process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back_free_memory() -> None:
    """Give free pages of the heap back to the system, where the C library can (glibc).

    Microbatches differ in size, so tensors of one do not fill the holes that the last one left, and the heap
    grows from step to step. A page that is needed again costs a page fault.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no such handle
        return None
    return trim
