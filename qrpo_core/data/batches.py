"""Which items an optimiser step holds, and how a step is cut into passes of the model.

What a step holds follows from (seed, epoch) alone, so neither the number of processes nor the memory of a
device changes what is computed. How a step is cut (its plan) follows from lengths and budgets: items of
like length share a pass, so that little is padded. Every process can make the whole plan by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qrpo_core.errors import ConfigError

IntArray = NDArray[np.int64]

#: What a pass costs besides its tokens, in tokens: launching kernels, reading the weights. A pass is cut in
#: two where that spares more padding than this.
PASS_TOKENS = 256

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Items that go through the model together.

    items : their indices, longest first.
    width : tokens of the widest, over all its rows; the pass holds len(items) * width tokens.
    weight : 1, or 0 for an item that only keeps the processes in step.
    """

    items: tuple[int, ...]
    width: int
    weight: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return len(self.items) * self.width


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The optimiser steps of every epoch.

    widths : [items] tokens that an item takes: rows times the longest of its rows.
    batch_size : items of a step over all processes; the last step of an epoch may hold fewer.
    seed : with the epoch it decides the order.
    processes : among which a step is shared out.
    max_tokens : tokens of a pass, padding included; a wider item goes alone. None: no limit.
    max_items : items of a pass. None: no limit.

    Raises ConfigError for no items or a limit below 1.
    """

    widths: IntArray
    batch_size: int
    seed: int = 0
    processes: int = 1
    max_tokens: int | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        limits = {"items": len(self.widths), "batch_size": self.batch_size, "processes": self.processes}
        limits |= {"max_tokens": self.max_tokens or 1, "max_items": self.max_items or 1}
        limits |= {name: 0 for name in ("max_tokens", "max_items") if getattr(self, name) == 0}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}", remedy="at least 1")

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.widths) / self.batch_size)

    def items(self, epoch: int, step: int) -> IntArray:
        """The items of a step, over all processes."""
        order = epoch_order(len(self.widths), self.seed, epoch)
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def micro_batches(self, epoch: int, step: int) -> list[list[MicroBatch]]:
        """The passes of a step: one list for each process, all of the same length."""
        return plan_step(
            self.items(epoch, step),
            self.widths,
            processes=self.processes,
            max_tokens=self.max_tokens,
            max_items=self.max_items,
        )


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> IntArray:
    """A permutation of range(count), decided by (seed, epoch).

    Philox's own numbers are sorted, which numpy keeps the same in every version (`permutation` it does not).
    """
    noise = np.random.Philox(key=np.array([seed & _WORD, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(noise, kind="stable").astype(np.int64)
    order.flags.writeable = False  # shared by the cache
    return order


def plan_step(
    items: IntArray,
    widths: IntArray,
    *,
    processes: int = 1,
    max_tokens: int | None = None,
    max_items: int | None = None,
) -> list[list[MicroBatch]]:
    """Share the items of a step out and cut every share into passes; their order does not matter.

    The items are dealt out longest first, to and fro, so that shares differ by at most one item, and by at
    most the longest item's tokens. Every process gets the same number of passes (sharded weights are
    gathered by all processes together): where one needs fewer, it splits a pass, or, with nothing left to
    split, repeats the shortest item with weight 0. Passes come largest first.
    """
    ordered = items[np.lexsort((items, -widths[items]))]
    turns, seats = np.divmod(np.arange(len(ordered)), processes)
    owner = np.where(turns % 2 == 0, seats, processes - 1 - seats)
    shares = [ordered[owner == process] for process in range(processes)]
    passes = [_pack(share, widths[share], max_tokens, max_items) for share in shares]
    most = max(len(one) for one in passes)
    shortest = int(ordered[-1])
    filler = MicroBatch((shortest,), int(widths[shortest]), 0)
    for one in passes:
        while len(one) < most:
            if not _split(one, widths):
                one.append(filler)
    return [sorted(one, key=lambda batch: (-batch.tokens, batch.items)) for one in passes]


def _pack(
    share: IntArray, widths: IntArray, max_tokens: int | None, max_items: int | None
) -> list[MicroBatch]:
    """Cut a share, longest first, into runs of the least cost: tokens, padding included, and `PASS_TOKENS`
    a pass. `best[stop]` is the least cost of the first `stop` items."""
    count = len(share)
    best = np.zeros(count + 1)
    cut = np.zeros(count + 1, dtype=np.int64)
    low = 0
    for stop in range(1, count + 1):
        # A run that begins earlier is both longer and wider: the beginnings that fit are low, ..., stop - 1.
        while low < stop - 1 and not _fits(stop - low, int(widths[low]), max_tokens, max_items):
            low += 1
        starts = np.arange(low, stop)
        cost = best[low:stop] + (stop - starts) * widths[low:stop] + PASS_TOKENS
        cut[stop] = low + int(np.argmin(cost))
        best[stop] = cost.min()
    passes: list[MicroBatch] = []
    stop = count
    while stop > 0:
        start = int(cut[stop])
        passes.append(_run(share[start:stop].tolist(), widths[start:stop].tolist()))
        stop = start
    return passes


def _fits(count: int, width: int, max_tokens: int | None, max_items: int | None) -> bool:
    within = max_tokens is None or count * width <= max_tokens
    return within and (max_items is None or count <= max_items)


def _run(items: Sequence[int], widths: Sequence[int]) -> MicroBatch:
    return MicroBatch(tuple(items), int(max(widths)))


def _split(passes: list[MicroBatch], widths: IntArray) -> bool:
    """Cut the pass in two where that spares most padding (else the largest in half); whether one could be."""
    options = []
    for place, batch in enumerate(passes):
        size = len(batch.items)
        for at in range(1, size):
            spared = (size - at) * (batch.width - int(widths[batch.items[at]]))
            options.append((spared, min(at, size - at) * batch.width, place, at))
    if not options:
        return False
    _, _, place, at = max(options)
    batch = passes[place]
    halves = (batch.items[:at], batch.items[at:])
    passes[place : place + 1] = [_run(half, widths[list(half)].tolist()) for half in halves]
    return True
