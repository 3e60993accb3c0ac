"""The trainer's data loader: item i is optimiser step i, as this process's microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from qrpo_core.common.errors import DataError
from qrpo_core.data.collator import Collator, Example, Item, Pair, length, rows_of
from qrpo_core.data.step_plan import ItemSizes, StepPlan
from qrpo_core.objective_kinds import Objective

#: (epoch, step), the index of an optimiser step.
Place = tuple[int, int]


class ChosenExamples(Sequence[Example]):
    """The examples of SFT: the chosen side of every pair, or the examples themselves.

    Raises DataError for a mixture of both.
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


def check_items(
    items: Sequence[Item], objective: Objective, max_length: int | None
) -> tuple[ItemSizes, bool]:
    """(tokens of each item; whether any ref_logprob is not 0).

    Raises DataError, with the item, for the wrong kind of item, a prompt or completion without tokens, a
    number that is not finite, beta <= 0, a sequence beyond `max_length`; if every ref_logprob is 0
    although the objective compares with the reference model; and if its loss needs log Z and no item has one.
    """
    if not items:
        raise DataError("no training items", remedy="give at least one")
    wanted = Pair if objective.pairwise else Example
    has_reference = has_partition = False

    def checked(place: int) -> list[tuple[Sequence[int], Sequence[int]]]:
        nonlocal has_reference, has_partition
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
            _check_row(row, f"item {place}", max_length, objective.zero_density)
        has_reference |= any(row.ref_logprob != 0 for row in rows)
        # A target of 0 may be the label one half of a prompt of equal rewards, whose log Z is 0.
        has_partition |= any(row.log_partition != 0 or row.target == 0 for row in rows)
        return [(row.prompt_token_ids, row.token_ids) for row in rows]

    sizes = ItemSizes.of(map(checked, range(len(items))))
    if objective.needs_reference and not has_reference:
        raise DataError(
            f"every ref_logprob is 0, and objective {objective.kind!r} compares with the reference model",
            remedy="store log pi_ref of each completion (an engine's logprobs)",
        )
    if objective.needs_log_partition and not has_partition:
        raise DataError(
            f"every log_partition is 0, and objective {objective.kind!r} has log Z in its loss",
            remedy="give each item the log_partition that its target was computed with",
        )
    return sizes, has_reference


def _check_row(row: Example, where: str, max_length: int | None, zero_density: bool) -> None:
    for name in ("prompt_token_ids", "token_ids"):
        if len(getattr(row, name)) == 0:
            raise DataError(f"{name} is empty", where=where, remedy="leave the item out, and count it")
    for name in ("target", "beta", "ref_logprob", "reward", "log_partition"):
        asks_for_zero = zero_density and name == "target" and row.target == -math.inf
        if not (math.isfinite(getattr(row, name)) or asks_for_zero):
            raise DataError(f"{name} is {getattr(row, name)}", where=where, remedy="compute it again")
    if row.beta <= 0:
        raise DataError(f"beta is {row.beta}", where=where, remedy="KL strengths are above 0")
    if max_length is not None and length(row) > max_length:
        raise DataError(
            f"a sequence of {length(row)} tokens exceeds the model's {max_length}",
            where=where,
            remedy="remove it, and count it; sequences are never cut",
        )


class StepDataset(Dataset[list[dict[str, Any]]]):
    """Optimiser steps by (epoch, step): the microbatches of one process.

    Each adds items_in_step [] float64, the step's items over all processes, to the collator's batch.
    """

    def __init__(self, items: Sequence[Item], plan: StepPlan, collator: Collator, process: int) -> None:
        self._items = items
        self._plan = plan
        self._collator = collator
        self._process = process

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, place: Place) -> list[dict[str, Any]]:
        epoch, step = place
        count = torch.tensor(len(self._plan.items(epoch, step)), dtype=torch.float64)
        batches = []
        for micro in self._plan.micro_batches(epoch, step)[self._process]:
            batch = self._collator([self._items[index] for index in micro.items])
            batches.append(batch | {"weight": batch["weight"] * micro.weight, "items_in_step": count})
        return batches


class EpochSampler(Sampler[list[Place]]):
    """The steps of an epoch, in order, each as a batch of one.

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


def step_loader(steps: StepDataset, args: TrainingArguments) -> DataLoader[list[dict[str, Any]]]:
    """A loader of whole steps, with the worker processes of `args`.

    Its generator is separate, so reading data does not change the random numbers of dropout.
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
