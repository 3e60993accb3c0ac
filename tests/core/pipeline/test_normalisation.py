"""The verdict of the normalisation check: of defaults, of planted errors, and of how few false alarms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qrpo_core.config import ObjectiveConfig
from qrpo_core.objective.quantiles import leave_one_out_counts, rank_counts_table
from qrpo_core.objective_kinds import make_objective
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective
from qrpo_core.pipeline.normalisation import normalisation_facts
from qrpo_core.reporting.summary import normalisation

RewardsOf = Any

LAWS: dict[str, RewardsOf] = {
    "continuous": lambda rng, size: rng.normal(size=size),
    "floor": lambda rng, size: np.maximum(rng.normal(size=size), -0.5),
    "ceiling": lambda rng, size: np.minimum(rng.normal(size=size), 0.5),
    "binary": lambda rng, size: (rng.random(size) < rng.random((size[0], 1))).astype(float),
}


def pool_of(law: str, prompts: int, n: int, seed: int = 0, trained: int | None = None) -> Pool:
    """Prompts with n references each, the first `trained` of which are the training completions."""
    rewards = LAWS[law](np.random.default_rng(seed), (prompts, n))
    codes = np.repeat(np.arange(prompts), n)
    rows = np.flatnonzero(np.arange(codes.size) % n < (trained or n))
    seeds = np.arange(codes.size, dtype=np.uint64)
    return Pool(
        codes=codes[rows],
        rewards=rewards.ravel()[rows],
        reference_codes=codes,
        reference_rewards=np.sort(rewards, axis=1).ravel(),  # as the store has them
        in_pool=True,
        counts=leave_one_out_counts(codes, rewards.ravel()).take(rows),
        lengths=np.full(rows.size, 10),
        seeds=seeds[rows],
        reference_seeds=seeds,
    )


def verdicts(pool: Pool, nats: float = 0.0, drawn: bool = True, **objective: Any) -> list[str]:
    """The verdicts with log Z off by `nats`; first of the training completions, then of held-out ones."""
    kind = make_objective(ObjectiveConfig(**objective))
    assert isinstance(kind, QuantileObjective)
    made = kind.targets(pool, normaliser=kind.config.normaliser, tie_tolerance=kind.config.tie_tolerance)
    off = replace(made, target=made.target - made.beta * nats, log_partition=made.log_partition + nats)
    facts = normalisation_facts(pool, off, kind, drawn)
    return [each.verdict for each in normalisation(facts | {"normaliser": made.normaliser})]


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict", "randomized"])
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.01, 1e-3])
def test_defaults_on_continuous_rewards_are_good(beta: float, tie_method: str) -> None:
    found = verdicts(pool_of("continuous", 400, 8), beta=beta, tie_method=tie_method)
    assert found[0] == "good"
    assert found[1] in ("good", "unclear")


@pytest.mark.parametrize("law", ["floor", "ceiling", "binary"])
@pytest.mark.parametrize("drawn", [True, False])
def test_defaults_on_rewards_that_tie_are_not_bad(law: str, drawn: bool) -> None:
    assert "bad" not in verdicts(pool_of(law, 400, 8), drawn=drawn)


@pytest.mark.parametrize("normaliser", ["population", "finite"])
@pytest.mark.parametrize("law", ["ceiling", "binary"])
def test_a_normaliser_that_does_not_count_ties_is_bad_in_the_pool_and_held_out(
    law: str, normaliser: str
) -> None:
    found = verdicts(pool_of(law, 400, 8), normaliser=normaliser, tie_tolerance=1.0)
    assert found == ["bad", "bad"]


@pytest.mark.parametrize("nats", [-0.3, 0.3])
@pytest.mark.parametrize("normaliser", ["auto", "population", "finite", "empirical"])
def test_a_planted_error_of_log_z_is_bad(normaliser: str, nats: float) -> None:
    assert verdicts(pool_of("continuous", 100, 8), nats, normaliser=normaliser)[0] == "bad"


def test_false_alarms_are_rare() -> None:
    """Few prompts, a part of the references trained on, small beta: the hardest case for a standard error."""
    found = [
        verdict
        for seed in range(40)
        for beta in (0.1, 1e-3)
        for verdict in verdicts(pool_of("continuous", 12, 16, seed, trained=2), beta=beta)
    ]
    assert len(found) == 160
    assert found.count("bad") <= 3


def test_how_far_another_log_z_is_above_the_tie_aware_one() -> None:
    pool = pool_of("continuous", 50, 8)
    kind = make_objective(ObjectiveConfig(normaliser="empirical"))
    assert isinstance(kind, QuantileObjective)
    facts = normalisation_facts(pool, kind.targets(pool, normaliser="empirical"), kind, True)
    assert facts["normalisation_mean"] == pytest.approx(1.0)  # by construction, and yet
    assert facts["log_partition_above_tie_aware"] == pytest.approx(np.log(1.64), abs=0.01)


def test_references_of_a_prompt_with_fewer_than_four_are_not_split() -> None:
    assert len(verdicts(pool_of("continuous", 20, 3))) == 1


def test_completions_of_another_policy_are_not_in_the_check() -> None:
    """Held-out of the references' own law the check is good, whatever the training completions are."""
    pool = pool_of("continuous", 200, 8)
    better = pool.reference_rewards + 3.0
    counts = rank_counts_table(
        pool.reference_codes, better, pool.reference_codes, pool.reference_rewards, False
    )
    other = replace(pool, rewards=better, counts=counts, in_pool=False)
    assert verdicts(other, drawn=False)[0] == "good"
