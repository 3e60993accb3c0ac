"""The expected normalisation check: by hand, by enumeration, against draws, and with planted errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qrpo_core.objective import (
    calibrated_targets,
    expected_weights,
    get_transform,
    normalization_check,
    rank_counts_table,
    reference_targets,
)

IDENTITY = get_transform("identity")


def checked(prompt, rewards, beta=0.1, change=lambda targets: targets, rows=slice(None), **how):
    """The check of the references `rows`, each left out of its own ranking."""
    transform = how.pop("transform", IDENTITY)
    targets = reference_targets(
        prompt, rewards, transform=transform, beta=beta, tie_tolerance=1.0,
        reference_seeds=np.arange(len(prompt), dtype=np.uint64), **how,
    )  # fmt: skip
    columns = ("quantile", "transformed", "beta", "log_partition", "target")
    targets = replace(change(targets), **{name: getattr(change(targets), name)[rows] for name in columns})
    n = np.bincount(prompt)[prompt][rows] - 1
    expected = expected_weights(
        targets, n, transform=transform, prompt=prompt[rows], reference_prompt=prompt,
        reference_rewards=rewards, reference_seeds=np.arange(len(prompt), dtype=np.uint64), in_pool=True,
    )  # fmt: skip
    return normalization_check(targets, prompt[rows], expected)


def pools(prompts, n, seed=0):
    rng = np.random.default_rng(seed)
    return np.repeat(np.arange(prompts), n), rng.random(prompts * n)


@pytest.mark.parametrize(("n", "beta", "expected"), [(8, 0.1, 1.64), (50, 0.003, 6.67)])
@pytest.mark.parametrize("normaliser", ["tie_aware", "population"])
def test_without_ties_the_mean_is_z_n_minus_1_over_z_and_not_1(n, beta, expected, normaliser):
    found = checked(*pools(30, n), beta=beta, normaliser=normaliser)
    by_hand = np.mean(np.exp((np.arange(n) / (n - 1) - 1) / beta)) / (beta * -np.expm1(-1 / beta))
    assert found.expected == pytest.approx(by_hand, rel=1e-12)
    assert found.expected == pytest.approx(expected, abs=0.005)
    assert found.mean == pytest.approx(found.expected, rel=1e-12)
    assert found.expected_error == pytest.approx(0.0, abs=1e-6)  # every reference is a sample


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict", "randomized"])
@pytest.mark.parametrize("normaliser", ["tie_aware", "empirical"])
@pytest.mark.parametrize("name", ["identity", "log", "normal"])
def test_a_normaliser_that_counts_ties_expects_what_is_there(normaliser, tie_method, name):
    prompt, rewards = pools(40, 6)
    rewards = np.where(rewards < 0.6, np.round(rewards * 4), rewards)
    found = checked(
        prompt, rewards, beta=0.3, normaliser=normaliser, tie_method=tie_method, transform=get_transform(name)
    )
    assert found.mean == pytest.approx(found.expected, rel=1e-10)
    if normaliser == "empirical":
        assert found.expected == pytest.approx(1.0)


@pytest.mark.parametrize("normaliser", ["population", "finite"])
def test_a_normaliser_that_does_not_count_ties_is_far_from_what_it_expects_where_rewards_tie(normaliser):
    prompt, rewards = pools(200, 8)
    found = checked(prompt, (rewards < 0.3).astype(float), normaliser=normaliser)
    assert found.mean > 1.5 * found.expected
    assert found.mean - found.expected > 10 * found.expected_error


@pytest.mark.parametrize("nats", [-0.2, 0.2])
def test_a_planted_error_of_log_z_is_found(nats):
    def plant(targets):
        off = targets.beta * nats
        return replace(targets, log_partition=targets.log_partition + nats, target=targets.target - off)

    found = checked(*pools(20, 8), change=plant)
    assert found.mean / found.expected == pytest.approx(np.exp(-nats), rel=1e-9)
    assert abs(found.mean - found.expected) > 10 * found.expected_error


def test_the_standard_error_of_some_references_of_a_pool_is_that_of_draws_without_repetition():
    """Over all choices of 2 of 5 references: exactly, not by simulation."""
    prompt, rewards = np.zeros(5, int), np.array([0.1, 0.5, 0.5, 0.7, 0.9])
    means = []
    for rows in itertools.combinations(range(5), 2):
        found = checked(prompt, rewards, beta=0.4, rows=np.array(rows))
        means.append(found.mean)
    assert found.expected == pytest.approx(np.mean(means), rel=1e-12)
    assert found.expected_error == pytest.approx(np.std(means), rel=1e-12)


@pytest.mark.parametrize("normaliser", ["tie_aware", "population", "finite", "empirical"])
def test_the_check_of_held_out_references_over_all_orders_of_their_rewards(normaliser):
    """Two held-out rewards among three references, all 120 orders: mean and standard error are exact."""
    means = []
    for order in itertools.permutations(range(5)):
        rewards = np.array(order, float)
        counts = rank_counts_table([0, 0], rewards[3:], [0, 0, 0], rewards[:3], False)
        held = {"prompt": [0, 0], "reference_prompt": [0] * 3, "reference_rewards": rewards[:3]}
        targets = calibrated_targets(counts, transform=IDENTITY, beta=0.2, normaliser=normaliser, **held)
        expected = expected_weights(targets, counts.n, transform=IDENTITY, in_pool=False, **held)
        found = normalization_check(targets, [0, 0], expected)
        means.append(found.mean)
    assert found.expected == pytest.approx(np.mean(means), rel=1e-12)
    assert found.expected_error == pytest.approx(np.std(means), rel=1e-12)
    if normaliser == "finite":
        assert found.expected == pytest.approx(1.0)


def test_draws_scatter_about_the_expected_mean_as_the_standard_error_says():
    off = []
    for seed in range(60):
        prompt, rewards = pools(40, 8, seed)
        rows = np.flatnonzero(np.arange(320) % 8 < 3)
        found = checked(prompt, rewards, rows=rows)
        off.append((found.mean - found.expected) / found.expected_error)
    assert abs(np.mean(off)) < 4 / np.sqrt(60)
    assert 0.7 < np.std(off) < 1.3


def test_without_expected_weights_nothing_is_expected():
    prompt, rewards = pools(3, 4)
    found = normalization_check(reference_targets(prompt, rewards, transform=IDENTITY, beta=0.1), prompt)
    assert np.isnan([found.expected, found.expected_error]).all()


def test_small_beta_neither_overflows_nor_warns():
    found = checked(*pools(5, 50), beta=1e-5)
    assert found.mean == pytest.approx(found.expected, rel=1e-9)
    assert found.expected == pytest.approx(2000.0, rel=1e-6)  # 1/(n beta)
