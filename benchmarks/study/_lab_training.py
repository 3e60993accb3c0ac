"""One cell, from its settings to exact results on held-out prompts: one number a seed of each measure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from _lab_policy import Loss, Schedule, train
from _lab_targets import TRUNCATION, Cell, Rows, calibrated, rows_of, target_quality, targets, world_of
from _lab_world import Floats, measures, optimum
from torch import Tensor

from qrpo_core.objective.losses import dpo_loss, qrpo_squared_loss, rebel_loss, sft_loss, simpo_loss, tup_loss


def run_cell(
    cell: Cell, seeds: tuple[int, ...], prompts: int, held_out: int, schedule: Schedule
) -> dict[str, list[float]]:
    """Measures of the cell's policy, [seeds] each; of targets, too, where the objective has some."""
    world, quantiles, held_out_quantiles = world_of(seeds, cell.law, prompts, held_out)
    quality: dict[str, Floats] = {}
    if cell.objective == "reference":
        log_policy = world.held_out.log_reference
    elif cell.objective == "optimum":
        log_policy = optimum(world.held_out, held_out_quantiles, cell.beta)
    else:
        rows = rows_of(world, quantiles, cell)
        if cell.objective == "qrpo":
            target = targets(world, quantiles, rows, cell)
            quality = target_quality(world, quantiles, rows, target, cell.beta)
            actions, loss = rows.samples.action, regression(target, cell.beta)
        elif cell.objective in ("best_of_n", "a_star"):
            target = calibrated(rows, cell).target.reshape(rows.samples.action.shape)
            actions, loss = rows.samples.action, regression(target, cell.beta)
        elif cell.objective == "tup":
            actions, loss = rows.samples.action, truncation(rows, cell)
        elif cell.objective == "sft":
            best = rows.references.reward.argmax(axis=-1)[..., None]
            actions, loss = rows.references.pick(best).action, imitation(len(seeds))
        else:
            actions, loss = pairs(rows, PAIR_LOSSES[cell.objective], cell.beta)
        log_policy = train(world, actions, loss, schedule)
    found = measures(world.held_out, held_out_quantiles, log_policy, cell.beta) | quality
    return {name: [float(f"{value:.6g}") for value in values] for name, values in found.items()}


def regression(target: Floats, beta: float) -> Loss:
    """The loss of QRPO on targets [S, P, k]."""
    goal = torch.tensor(target, dtype=torch.float32)

    def loss(policy: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        return qrpo_squared_loss(policy, reference, goal[:, rows].flatten(), beta).mean() * len(goal)

    return loss


def truncation(rows: Rows, cell: Cell) -> Loss:
    """The loss of TUP: labels max(R_q - lambda, 0)."""
    found, shape = calibrated(rows, cell), rows.samples.action.shape
    label = torch.tensor(np.maximum(found.quantile - TRUNCATION, 0.0).reshape(shape), dtype=torch.float32)
    log_z = torch.tensor(found.log_partition.reshape(shape), dtype=torch.float32)

    def loss(policy: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        own = label[:, rows].flatten(), log_z[:, rows].flatten()
        return tup_loss(policy, reference, *own, cell.beta).mean() * len(label)

    return loss


def imitation(seeds: int) -> Loss:
    """The loss of SFT."""
    return lambda policy, reference, rows: sft_loss(policy).mean() * seeds


def pairs(rows: Rows, pair_loss: Callable[..., Tensor], beta: float) -> tuple[np.ndarray, Loss]:
    """(actions [S, P, k], loss) of neighbouring samples as pairs, better one first; ties weigh nothing."""
    first, second = rows.samples.reward[..., 0::2], rows.samples.reward[..., 1::2]
    swap = (second > first).repeat(2, axis=-1)
    index = np.arange(swap.shape[-1]) ^ swap
    ordered = rows.samples.pick(index)
    weight = torch.tensor(first != second, dtype=torch.float32)
    reward = torch.tensor(ordered.reward, dtype=torch.float32)

    def loss(policy: Tensor, reference: Tensor, numbers: Tensor) -> Tensor:
        here = reward[:, numbers].flatten()
        each = pair_loss(
            policy[0::2], policy[1::2], reference[0::2], reference[1::2], here[0::2], here[1::2], beta
        )
        return (each * weight[:, numbers].flatten()).mean() * len(weight)

    return ordered.action, loss


def _dpo(*columns: Tensor | float) -> Tensor:
    return dpo_loss(*columns[:4], columns[6])


def _simpo(*columns: Tensor | float) -> Tensor:
    one = torch.ones_like(columns[0])  # an action is one token long
    return simpo_loss(columns[0], columns[1], one, one, columns[6], SIMPO_RATIO)


SIMPO_RATIO = 0.5
PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": _dpo, "simpo": _simpo, "rebel": rebel_loss}
