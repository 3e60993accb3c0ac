"""From a cell's settings to training rows: samples, references, and targets of every variant."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from _lab_shrunken import make_cells, shrunken_log_partition, shrunken_quantiles
from _lab_world import (
    Floats,
    Law,
    Samples,
    World,
    draw,
    make_world,
    optimum,
    true_log_partition,
    true_quantiles,
)

from qrpo_core.objective import (
    CalibratedTargets,
    Normaliser,
    RewardTransform,
    TieMethod,
    TruncatedLogit,
    calibrated_targets,
    get_transform,
    rank_counts_table,
)
from qrpo_core.objective.values import value_targets

#: The tie methods of variants; all others are weak.
TIE_METHODS: dict[str, TieMethod] = {
    "randomized": "randomized",
    "mid": "mid",
    "mid_tie_aware": "mid",
    "mid_population": "mid",
}
#: The project's normaliser that a variant takes, if not the one of its name.
NORMALISER: dict[str, Normaliser] = {
    "randomized": "population",
    "mid": "empirical",
    "mid_tie_aware": "tie_aware",
    "mid_population": "population",
    "pooled": "tie_aware",
    "true_log_z": "population",
    "true_quantile": "tie_aware",
}
REFERENCE_STREAM, OFFLINE_STREAM = 1, 2
OFFLINE_BETA = 0.2
POOL = 6
"""Completions of a prompt that best_worst picks from."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training (20 seeds at once), by its settings.

    mode : random (trained completions are references), offline (drawn from a better policy), best_worst.
    ranks : left_out, plain (a trained completion counts among its own references) or disjoint (references
        from outside the pool that best_worst picks from).
    n : references a prompt, drawn in all. trained : completions a prompt that are trained on.
    variant : a normaliser or a candidate; of other objectives the empty string.
    """

    law: Law
    objective: str = "qrpo"
    variant: str = "population"
    beta: float = 0.1
    n: int = 8
    trained: int = 4
    mode: str = "random"
    ranks: str = "left_out"

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples [S, P, k] and the references [S, P, m] that rank them; in_pool : each sample is one of them."""

    samples: Samples
    references: Samples
    in_pool: bool


@lru_cache(maxsize=2)
def world_of(seeds: tuple[int, ...], law: Law, prompts: int, held_out: int) -> tuple[World, Floats, Floats]:
    """A world, and the true quantiles of its training and held-out prompts."""
    world = make_world(seeds, law, prompts, held_out)
    return world, true_quantiles(world.train), true_quantiles(world.held_out)


def rows_of(world: World, quantiles: Floats, cell: Cell) -> Rows:
    """The rows of a cell; draws are the same for all cells of a mode."""
    drawn = draw(world, world.train.log_reference, cell.n, REFERENCE_STREAM)
    if cell.mode == "offline":
        better = optimum(world.train, quantiles, OFFLINE_BETA)
        return Rows(draw(world, better, cell.trained, OFFLINE_STREAM), drawn, False)
    if cell.mode == "random":
        return Rows(drawn.take(0, cell.trained), drawn, cell.ranks == "left_out")
    pool = drawn.take(0, POOL).reward
    picked = drawn.pick(np.stack([pool.argmax(axis=-1), pool.argmin(axis=-1)], axis=-1))
    if cell.ranks == "disjoint":
        return Rows(picked, drawn.take(POOL, cell.n), False)
    return Rows(picked, drawn, cell.ranks == "left_out")


TRUNCATION = 0.5
"""TUP's: the quantile up to which completions are given up."""
#: The transforms of objectives on quantiles; `best_of_n` is QRPO with the log transform.
TRANSFORMS: dict[str, RewardTransform] = {
    "qrpo": get_transform("identity"),
    "best_of_n": get_transform("log"),
    "tup": TruncatedLogit(TRUNCATION),
}


def targets(world: World, quantiles: Floats, rows: Rows, cell: Cell) -> Floats:
    """f(R_q) - beta log Z of the samples, [S, P, k]; all but the project's normalisers with f(t) = t.

    Variants beside the project's normalisers: true, true_mid: quantile and log Z known; true_log_z,
    true_quantile: one of them known; pooled: the mean log Z of all prompts; randomized, mid and its kin:
    other tie methods; shrunken and its kin: `_shrunken`; NAME+NATS: log Z less by so many nats.
    """
    variant, beta, actions = cell.variant, cell.beta, rows.samples.action
    base, shifted, nats = variant.partition("+")
    if shifted:
        return targets(world, quantiles, rows, replace(cell, variant=base)) + beta * float(nats)
    if variant in ("true", "true_mid"):
        tie_method = "weak" if variant == "true" else "mid"
        known = np.take_along_axis(true_quantiles(world.train, tie_method), actions, axis=-1)
        return known - beta * true_log_partition(world.train, beta, tie_method)[..., None]
    if variant.startswith("shrunken"):
        return _shrunken(rows, cell)
    found = calibrated(rows, cell)
    q, log_z = (each.reshape(actions.shape) for each in (found.transformed, found.log_partition))
    if variant == "true_log_z":
        log_z = true_log_partition(world.train, beta)[..., None]
    elif variant == "true_quantile":
        q = np.take_along_axis(quantiles, actions, axis=-1)
    elif variant == "pooled":
        log_z = log_z.mean(axis=(1, 2), keepdims=True)
    else:
        return found.target.reshape(actions.shape)
    return q - beta * log_z


def calibrated(rows: Rows, cell: Cell) -> CalibratedTargets:
    """The project's targets, also of A*-PO with value_beta = beta; all [S * P * k]."""
    rewards, references = rows.samples.reward, rows.references.reward
    groups = rewards.shape[0] * rewards.shape[1]
    prompt, reference_prompt = (np.arange(groups).repeat(each.shape[-1]) for each in (rewards, references))
    counts = rank_counts_table(prompt, rewards.ravel(), reference_prompt, references.ravel(), rows.in_pool)
    if cell.objective == "a_star":
        return value_targets(
            counts,
            rewards.ravel(),
            prompt,
            reference_prompt=reference_prompt,
            reference_rewards=references.ravel(),
            beta=cell.beta,
            value_beta=cell.beta,
        )
    return calibrated_targets(
        counts,
        transform=TRANSFORMS[cell.objective],
        beta=cell.beta,
        tie_method=TIE_METHODS.get(cell.variant, "weak"),
        normaliser=NORMALISER.get(cell.variant, cell.variant),
        prompt=prompt,
        reference_prompt=reference_prompt,
        reference_rewards=references.ravel(),
        seeds=np.arange(prompt.size, dtype=np.uint64),
        reference_seeds=np.arange(references.size, dtype=np.uint64),
        tie_tolerance=1.0,
    )


def _shrunken(rows: Rows, cell: Cell) -> Floats:
    """Targets from shrunken masses, [S, P, k]; each world has its own prior.

    shrunken: log Z alone; shrunken_both: quantiles, too; shrunken_mid: both, under the tie method mid;
    shrunken_pooled: quantiles, and the mean log Z of all prompts.
    """
    tie_method = "mid" if cell.variant == "shrunken_mid" else "weak"
    if cell.variant == "shrunken":
        found = calibrated(rows, replace(cell, variant="population")).transformed.reshape(
            rows.samples.action.shape
        )
    else:
        found = np.empty(rows.samples.reward.shape)
    for place, references in enumerate(rows.references.reward):
        cells = make_cells(references)
        if cell.variant != "shrunken":
            rewards = rows.samples.reward[place]
            found[place] = shrunken_quantiles(cells, rewards, references, rows.in_pool, tie_method)
        log_z = shrunken_log_partition(cells, cell.beta, tie_method)[:, None]
        found[place] -= cell.beta * (log_z.mean() if cell.variant == "shrunken_pooled" else log_z)
    return found


def target_quality(
    world: World, quantiles: Floats, rows: Rows, target: Floats, beta: float
) -> dict[str, Floats]:
    """What is wrong with targets [S, P, k], [S] each.

    bias, noise : mean and standard deviation of target/beta less the true log-ratio target, nats. positive :
    share of the targets above 0. sign_right : share with the sign of the true one.
    """
    known = np.take_along_axis(quantiles, rows.samples.action, axis=-1)
    known = known - beta * true_log_partition(world.train, beta)[..., None]
    off = ((target - known) / beta).reshape(len(target), -1)
    right = (target > 0) == (known > 0)
    return {
        "bias": off.mean(axis=1),
        "noise": off.std(axis=1),
        "positive": (target > 0).mean(axis=(1, 2)),
        "sign_right": right.mean(axis=(1, 2)),
    }
