"""The trainer's data loader: item i is optimiser step i, as this process's padded micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from qrpo_core.data.batches import IntArray, StepPlan
from qrpo_core.data.collator import Collator, Example, Item, Pair, length, rows_of
from qrpo_core.errors import DataError
from qrpo_core.train.objectives import TrainingObjective

#: (epoch, step): everything that a worker process needs to know.
Place = tuple[int, int]


class ChosenHalves(Sequence[Example]):
    """The chosen side of every pair: what SFT trains on; the rejected never go through the model.

    Examples stay as they are. Raises DataError for a mixture of both.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        kinds = sorted({type(items[place]).__name__ for place in range(len(items))})
        if len(kinds) > 1:
            raise DataError(f"items of types {' and '.join(kinds)}", remedy="give items of one kind")
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return rows_of(self._items[index])[0]


@dataclass(frozen=True)
class Checked:
    """What a look at every item found.

    widths : [items] tokens, rows times the longest row. has_reference : whether any ref_logprob is not 0.
    """

    widths: IntArray
    has_reference: bool


def check_items(items: Sequence[Item], objective: TrainingObjective, max_length: int | None) -> Checked:
    """Refuse what cannot be trained on.

    Raises DataError naming the row: the wrong kind of item, a prompt or completion without tokens, a number
    that is not finite, beta <= 0, a sequence beyond `max_length`; and where every ref_logprob is 0 though
    the objective compares with the reference.
    """
    if not items:
        raise DataError("no training items", remedy="give at least one")
    wanted = Pair if objective.pairwise else Example
    widths = np.zeros(len(items), dtype=np.int64)
    has_reference = False
    for place in range(len(items)):
        item = items[place]
        if not isinstance(item, wanted):
            raise DataError(
                f"objective {objective.kind!r} takes items of type {wanted.__name__}, "
                f"not {type(item).__name__}",
                where=f"item {place}",
                remedy="give a Pair(chosen, rejected)" if objective.pairwise else "give an Example",
            )
        rows = rows_of(item)
        for row in rows:
            _check_row(row, f"item {place}", max_length)
        has_reference |= any(row.ref_logprob != 0 for row in rows)
        widths[place] = len(rows) * max(length(row) for row in rows)
    if objective.needs_reference and not has_reference:
        raise DataError(
            f"every ref_logprob is 0, and objective {objective.kind!r} compares with the reference",
            remedy="store log pi_ref of each completion (an engine's logprobs)",
        )
    return Checked(widths, has_reference)


def _check_row(row: Example, where: str, max_length: int | None) -> None:
    for name in ("prompt_token_ids", "token_ids"):
        if len(getattr(row, name)) == 0:
            raise DataError(f"{name} is empty", where=where, remedy="leave the item out, and count it")
    for name in ("target", "beta", "ref_logprob", "reward"):
        if not math.isfinite(getattr(row, name)):
            raise DataError(f"{name} is {getattr(row, name)}", where=where, remedy="make it again")
    if row.beta <= 0:
        raise DataError(f"beta is {row.beta}", where=where, remedy="KL strengths are above 0")
    if max_length is not None and length(row) > max_length:
        raise DataError(
            f"a sequence of {length(row)} tokens exceeds the model's {max_length}",
            where=where,
            remedy="remove it, and count it; sequences are never cut",
        )


class Steps(Dataset[list[dict[str, torch.Tensor]]]):
    """Optimiser steps by (epoch, step): the micro-batches of one process.

    To what the collator gives, each adds items_in_step [] float64: the step's items over all processes.
    """

    def __init__(self, items: Sequence[Item], plan: StepPlan, collator: Collator, process: int) -> None:
        self._items = items
        self._plan = plan
        self._collator = collator
        self._process = process

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Place) -> list[dict[str, torch.Tensor]]:
        epoch, step = place
        count = torch.tensor(len(self._plan.items(epoch, step)), dtype=torch.float64)
        made = []
        for micro in self._plan.micro_batches(epoch, step)[self._process]:
            batch = self._collator([self._items[index] for index in micro.items])
            made.append(batch | {"weight": batch["weight"] * micro.weight, "items_in_step": count})
        return made


class EpochSampler(Sampler[list[Place]]):
    """The places of an epoch, in order, each as a batch of one.

    A batch sampler, because accelerate's `skip_first_batches` (a resumed epoch) skips in those. The Trainer
    looks for `set_epoch` on `loader.batch_sampler.batch_sampler`: that attribute is the sampler accelerate
    wraps when it skips, and this one itself when it does not.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0

    @property
    def batch_sampler(self) -> EpochSampler:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Place]]:
        epoch = self.epoch
        return ([(epoch, step)] for step in range(self.steps))


def step_loader(steps: Steps, args: TrainingArguments) -> DataLoader[list[dict[str, torch.Tensor]]]:
    """A loader of whole steps with the workers that the arguments ask for.

    Its worker seed comes from a generator of its own, so that reading data draws nothing from the random
    numbers that dropout takes.
    """
    return DataLoader(
        steps,
        batch_sampler=EpochSampler(len(steps)),
        collate_fn=_only,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        generator=torch.Generator().manual_seed(args.seed),
    )


def _only(batch: list[Any]) -> Any:
    """The one element of a batch of one."""
    (element,) = batch
    return element
