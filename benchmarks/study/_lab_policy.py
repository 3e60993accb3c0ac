"""The lab's policy: a small network over prompt features, trained for all seeds at once.

Its logits are network(features) + structure. It begins as the pretrained network, so as the reference
policy, and all its weights train. The losses are those of qrpo_core.objective.losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _lab_world import Floats, Prompts, World
from torch import Tensor

LEARNING_RATE, EPOCHS, BATCH = 2e-2, 10, 100
"""Chosen on other worlds (seeds 1000 to 1019); rates from 0.01 and up to 40 epochs were tried."""

#: (log pi, log pi_ref of items [rows, k], row numbers of the prompts [batch]) -> losses, one weight each.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """AdamW without decay; the rate falls to 0 along a cosine."""

    learning_rate: float = LEARNING_RATE
    epochs: int = EPOCHS
    batch: int = BATCH


def train(world: World, actions: np.ndarray, loss: Loss, schedule: Schedule) -> Floats:
    """log pi of the trained policies on held-out prompts, [S, Q, A].

    actions : [S, P, k], the completions whose log-probs the loss gets.
    loss : from log pi and log pi_ref, both [S * batch * k], and the prompts' numbers [batch], the mean loss
        of each world's batch, summed over worlds: no gradient passes between worlds.
    """
    first, second = (torch.tensor(each, dtype=torch.float32, requires_grad=True) for each in _weights(world))
    features, structure, reference = _tensors(world.train)
    chosen = torch.as_tensor(actions)
    ref_logprob = reference.gather(-1, chosen)
    prompts = features.shape[1]
    batch = min(schedule.batch, prompts)
    steps = schedule.epochs * (prompts // batch)
    optimizer = torch.optim.Adam([first, second], lr=schedule.learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shuffler = torch.Generator().manual_seed(0)  # one order for every variant: comparisons are paired
    for _ in range(schedule.epochs):
        order = torch.randperm(prompts, generator=shuffler)
        for rows in order[: prompts // batch * batch].split(batch):
            logits = _network(features[:, rows], first, second) + structure[:, rows]
            logprob = torch.log_softmax(logits, dim=-1).gather(-1, chosen[:, rows])
            optimizer.zero_grad()
            loss(logprob.flatten(), ref_logprob[:, rows].flatten(), rows).backward()
            optimizer.step()
            falling.step()
    return _held_out(world, first, second)


def _held_out(world: World, first: Tensor, second: Tensor) -> Floats:
    features, structure, _ = _tensors(world.held_out)
    with torch.no_grad():
        logits = (_network(features, first, second) + structure).double()
        return np.asarray(torch.log_softmax(logits, dim=-1))


def _weights(world: World) -> tuple[Floats, Floats]:
    return world.first, world.second


def _network(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.tanh(features @ first) @ second


def _tensors(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    columns = (prompts.features, prompts.structure, prompts.log_reference)
    features, structure, reference = (torch.tensor(each, dtype=torch.float32) for each in columns)
    return features, structure, reference
