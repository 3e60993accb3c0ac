"""Rows of many lengths through a model in few passes, within a budget of tokens that memory may lower."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qrpo_core.data.batches import plan_step
from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import EngineError


class Passes:
    """Runs rows in passes of like length; remembers what fitted into memory.

    max_tokens : tokens of a pass, padding included; a longer row goes alone. It is halved whenever a pass
        runs out of memory, and stays so.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def run(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], None],
        progress: Progress = no_progress,
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Call `work` with the rows of every pass, longest first; each row once, whatever memory does.

        lengths : tokens of each row. work : takes row numbers; one that raises for want of memory must have
        changed nothing, since its rows come again in smaller passes. name : what a row is called in messages.

        Raises EngineError naming a row that does not fit by itself.
        """
        widths = np.asarray(lengths, dtype=np.int64)
        left = np.arange(len(widths))
        while len(left):
            for batch in plan_step(left, widths, max_tokens=self.max_tokens)[0]:
                rows = list(batch.items)
                if not _fits(partial(work, rows)):
                    if len(rows) == 1:
                        raise EngineError(
                            f"a row of {batch.width} tokens does not fit into memory by itself",
                            where=name(rows[0]),
                            remedy="use a device with more memory, or leave the row out; rows are never cut",
                        )
                    self.max_tokens = max(1, min(self.max_tokens, batch.tokens) // 2)
                    break
                progress(len(rows))
                left = left[~np.isin(left, rows, assume_unique=True)]


def _fits(call: Callable[[], None]) -> bool:
    """Whether a call had memory enough; other errors pass through."""
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    else:
        return True
    # Outside the handler, since the error holds the frames, and they hold the tensors.
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the machine."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator and some libraries of accelerators raise a plain RuntimeError.
    told = ("can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told)
