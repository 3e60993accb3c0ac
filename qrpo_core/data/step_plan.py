"""The items of each optimiser step, and the packed passes that a step is cut into.

The items of a step depend on (seed, epoch) alone: neither the number of processes nor the memory of a device
changes the result. Nothing is padded, so a microbatch costs the tokens of its distinct prompts and of its
completions, and there are as few as the budget allows. Every process computes the whole plan by itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.hashing import digest_bytes

IntArray = NDArray[np.int64]

_WORD = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class ItemSizes:
    """Tokens of items; arrays [items].

    prompts : a number for each item's prompt; items of equal number have equal prompts, which a microbatch
        holds once. prompt_tokens : of that prompt. completion_tokens : of all completions of the item.
    """

    prompts: IntArray
    prompt_tokens: IntArray
    completion_tokens: IntArray

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, items: Iterable[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> ItemSizes:
        """items : the rows of each, as (prompt, completion) token ids.

        An item whose rows have unequal prompts shares none of them.
        """
        numbers: dict[tuple[str, ...], int] = {}
        found: list[tuple[int, int, int]] = []
        for place, rows in enumerate(items):
            digests = {digest_bytes(np.asarray(prompt, np.int64).tobytes()) for prompt, _ in rows}
            shared = len(digests) == 1
            key = tuple(digests) if shared else ("item", str(place))
            number = numbers.setdefault(key, len(numbers))
            tokens = len(rows[0][0]) if shared else sum(len(prompt) for prompt, _ in rows)
            found.append((number, tokens, sum(len(completion) for _, completion in rows)))
        return cls(*np.array(found, dtype=np.int64).reshape(-1, 3).T)

    def tokens(self, items: Sequence[int]) -> int:
        """Tokens of a microbatch of these items."""
        prompts = {int(self.prompts[item]): int(self.prompt_tokens[item]) for item in items}
        return sum(prompts.values()) + int(self.completion_tokens[list(items)].sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Items that go through the model together, in one packed row.

    items : indices of the items, those of one prompt beside each other.
    tokens : tokens of the row.
    weight : 1, or 0 for a filler that only keeps the processes in step.
    """

    items: tuple[int, ...]
    tokens: int
    weight: int = 1


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The optimiser steps of every epoch.

    sizes : tokens of the items.
    batch_size : items of a step over all processes; the last step of an epoch may hold fewer.
    seed : decides the order, together with the epoch.
    processes : number of processes that share a step.
    max_tokens : tokens of a microbatch; a longer item goes alone. None: no limit.
    max_items : items of a microbatch. None: no limit.

    Raises ConfigError for no items or a limit below 1.
    """

    sizes: ItemSizes
    batch_size: int
    seed: int = 0
    processes: int = 1
    max_tokens: int | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        limits = {"items": len(self.sizes), "batch_size": self.batch_size, "processes": self.processes}
        limits |= {"max_tokens": self.max_tokens or 1, "max_items": self.max_items or 1}
        limits |= {name: 0 for name in ("max_tokens", "max_items") if getattr(self, name) == 0}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}", remedy="at least 1")

    def __len__(self) -> int:
        """The number of steps of an epoch."""
        return math.ceil(len(self.sizes) / self.batch_size)

    def items(self, epoch: int, step: int) -> IntArray:
        """Return the items of a step, over all processes."""
        order = epoch_order(self.sizes, self.seed, epoch)
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def micro_batches(self, epoch: int, step: int) -> list[list[MicroBatch]]:
        """Return the microbatches of a step: one list for each process, all of the same length."""
        return plan_step(
            self.items(epoch, step),
            self.sizes,
            processes=self.processes,
            max_tokens=self.max_tokens,
            max_items=self.max_items,
        )


@lru_cache(maxsize=2)
def epoch_order(sizes: ItemSizes, seed: int, epoch: int) -> IntArray:
    """Return the order of the items in an epoch, by (seed, epoch): random, but a prompt's items in twos.

    Two items of one prompt share its tokens in a microbatch. Where one is better and the other worse, what
    their gradients have in common cancels within the step. More than two of a prompt lie apart, so that a
    step holds many prompts.

    It sorts raw numbers of Philox: numpy keeps those the same in every version, but not `permutation`.
    """
    count = len(sizes)
    noise = np.random.Philox(key=np.array([seed & _WORD, epoch], dtype=np.uint64)).random_raw(2 * count)
    by_prompt = np.lexsort((noise[count:], sizes.prompts))
    numbers, places = sizes.prompts[by_prompt], np.arange(count)
    starts = np.concatenate([[True], numbers[1:] != numbers[:-1]])
    within = places - np.maximum.accumulate(np.where(starts, places, 0))
    first = by_prompt[places - within % 2]
    order = by_prompt[np.argsort(noise[first], kind="stable")].astype(np.int64)
    order.flags.writeable = False  # shared by the cache
    return order


def plan_step(
    items: IntArray,
    sizes: ItemSizes,
    *,
    processes: int = 1,
    max_tokens: int | None = None,
    max_items: int | None = None,
) -> list[list[MicroBatch]]:
    """Deal the items of a step to the processes and pack each process's part into microbatches.

    Items of one prompt stay together, unless a budget or an equal share of the processes is smaller. Each
    group goes to the process with the fewest tokens so far, longest group first, so that loads differ by at
    most the longest group. Every process gets the same number of microbatches, because all processes gather
    sharded weights together. A process that needs fewer splits one; with nothing left to split, it repeats
    the shortest item with weight 0. Microbatches are ordered longest first.
    """
    groups = _groups(items, sizes, processes, max_tokens, max_items)
    parts = [_pack(part, sizes, max_tokens, max_items) for part in _deal(groups, sizes, processes)]
    most = max(1, *map(len, parts))
    shortest = min(items.tolist(), key=lambda item: (sizes.tokens([item]), item))
    for part in parts:
        while len(part) < most and _split(part, sizes):
            pass
    found = [[MicroBatch(tuple(batch), sizes.tokens(batch)) for batch in part] for part in parts]
    filler = MicroBatch((shortest,), sizes.tokens([shortest]), 0)
    return [
        sorted(part, key=lambda batch: (-batch.tokens, batch.items)) + [filler] * (most - len(part))
        for part in found
    ]


def _groups(
    items: IntArray, sizes: ItemSizes, processes: int, max_tokens: int | None, max_items: int | None
) -> list[list[int]]:
    """The items by prompt, longest first, cut where a group exceeds a budget or a process's equal share."""
    order = items[np.lexsort((items, -sizes.completion_tokens[items], sizes.prompts[items]))].tolist()
    share = math.ceil(sizes.tokens(order) / processes) if processes > 1 else None
    limit = min((value for value in (max_tokens, share) if value is not None), default=None)
    groups: list[list[int]] = []
    tokens, number = 0, -1
    for item in order:
        more = int(sizes.completion_tokens[item])
        same = int(sizes.prompts[item]) == number
        if not same or not _fits(tokens + more, len(groups[-1]) + 1, limit, max_items):
            groups.append([])
            number, tokens = int(sizes.prompts[item]), int(sizes.prompt_tokens[item])
        groups[-1].append(item)
        tokens += more
    return sorted(groups, key=lambda group: (-sizes.tokens(group), group))


def _deal(groups: Sequence[Sequence[int]], sizes: ItemSizes, parts: int) -> list[list[Sequence[int]]]:
    """Deal groups, longest first, each to the part with the fewest tokens so far."""
    dealt: list[list[Sequence[int]]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for group in groups:
        load, part = loads[0]
        dealt[part].append(group)
        heapq.heapreplace(loads, (load + sizes.tokens(group), part))
    return dealt


def _pack(
    groups: Sequence[Sequence[int]], sizes: ItemSizes, max_tokens: int | None, max_items: int | None
) -> list[list[int]]:
    """Groups, longest first, in as few microbatches as first-fit or an even deal finds; even where possible.

    An even deal needs less memory than full microbatches and a small rest.
    """
    first = _first_fit(groups, sizes, max_tokens, max_items)
    total = sum(sizes.tokens(group) for group in groups)
    fewest = 1 if max_tokens is None else max(1, math.ceil(total / max_tokens))
    for count in range(min(fewest, len(first)), len(first) + 1):
        even = [list(chain(*part)) for part in _deal(groups, sizes, count)]
        alone = [len(part) == 1 for part in even]
        fits = [_fits(sizes.tokens(part), len(part), max_tokens, max_items) for part in even]
        if all(len(part) > 0 and (fit or one) for part, fit, one in zip(even, fits, alone, strict=True)):
            return even
    return first


def _first_fit(
    groups: Sequence[Sequence[int]], sizes: ItemSizes, max_tokens: int | None, max_items: int | None
) -> list[list[int]]:
    """Each group in the first microbatch that has room for it."""
    room, places = np.zeros(len(groups), dtype=np.int64), np.zeros(len(groups), dtype=np.int64)
    packed: list[list[int]] = []
    for group in groups:
        tokens = sizes.tokens(group)
        fits = (room[: len(packed)] >= tokens) & (places[: len(packed)] >= len(group))
        at = int(np.argmax(fits)) if fits.any() else len(packed)
        if at == len(packed):
            packed.append([])
            room[at] = max_tokens if max_tokens is not None else np.iinfo(np.int64).max
            places[at] = max_items if max_items is not None else np.iinfo(np.int64).max
        packed[at].extend(group)
        room[at] -= tokens
        places[at] -= len(group)
    return packed


def _fits(tokens: int, count: int, max_tokens: int | None, max_items: int | None) -> bool:
    return (max_tokens is None or tokens <= max_tokens) and (max_items is None or count <= max_items)


def _split(microbatches: list[list[int]], sizes: ItemSizes) -> bool:
    """Split the longest microbatch of several items in two of like length. False if none can be split."""
    several = [place for place, batch in enumerate(microbatches) if len(batch) > 1]
    if not several:
        return False
    place = max(several, key=lambda at: (sizes.tokens(microbatches[at]), -at))
    batch = microbatches[place]
    ordered = sorted(([item] for item in batch), key=lambda one: (-sizes.tokens(one), one))
    microbatches[place : place + 1] = [list(chain(*half)) for half in _deal(ordered, sizes, 2)]
    return True
