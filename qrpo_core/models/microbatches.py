"""Run rows of many lengths through a model in few microbatches, within a budget of tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from qrpo_core.common.errors import EngineError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.data.step_plan import IntArray, ItemSizes, plan_step

#: (row numbers left, budget of tokens) -> the rows and tokens of each microbatch.
_Plan: TypeAlias = Callable[[IntArray, int], list[tuple[list[int], int]]]


class Microbatches:
    """Runs rows in few microbatches, and remembers the size that fits into memory.

    max_tokens : tokens of a microbatch; a longer row goes alone. It is halved for good when a microbatch runs
        out of memory.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def run(
        self,
        sizes: ItemSizes,
        work: Callable[[list[int]], None],
        progress: Progress = no_progress,
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Call `work` with the rows of every packed microbatch. Each row succeeds exactly once.

        sizes : tokens of each row. work : takes row numbers; a call that runs out of memory must have no
        effect, because its rows are run again in smaller microbatches. name : of a row, for messages.

        Raises EngineError naming a row that does not fit alone.
        """

        def plan(left: IntArray, max_tokens: int) -> list[tuple[list[int], int]]:
            (passes,) = plan_step(left, sizes, max_tokens=max_tokens)
            return [(list(one.items), one.tokens) for one in passes]

        self._run(len(sizes), plan, work, progress, name)

    def run_padded(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], None],
        progress: Progress = no_progress,
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        """`run` for work that pads its rows to the longest: microbatches of similar length, longest first.

        lengths : tokens of each row.
        """
        widths = np.asarray(lengths, dtype=np.int64)

        def plan(left: IntArray, max_tokens: int) -> list[tuple[list[int], int]]:
            ordered = left[np.lexsort((left, -widths[left]))].tolist()
            batches = []
            while ordered:
                width = int(widths[ordered[0]])
                count = max(1, max_tokens // width)
                batches.append((ordered[:count], width * len(ordered[:count])))
                ordered = ordered[count:]
            return batches

        self._run(len(widths), plan, work, progress, name)

    def _run(
        self,
        rows: int,
        plan: _Plan,
        work: Callable[[list[int]], None],
        progress: Progress,
        name: Callable[[int], str],
    ) -> None:
        left = np.arange(rows)
        while len(left):
            for batch, tokens in plan(left, self.max_tokens):
                if not _fits(partial(work, batch)):
                    if len(batch) == 1:
                        raise EngineError(
                            f"a row of {tokens} tokens does not fit into memory alone",
                            where=name(batch[0]),
                            remedy="use a device with more memory, or leave the row out; rows are never cut",
                        )
                    self.max_tokens = max(1, min(self.max_tokens, tokens) // 2)
                    break
                progress(len(batch))
                left = left[~np.isin(left, batch, assume_unique=True)]


def _fits(call: Callable[[], None]) -> bool:
    """Whether a call ran without running out of memory; other errors are raised."""
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # Outside the handler, because the error keeps its frames alive, and they keep the tensors.
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine ran out of memory."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator and some libraries of accelerators raise a plain RuntimeError.
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in messages)
