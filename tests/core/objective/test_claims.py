"""One test for each claim of docs/reference/method.md, section 3, named after the claim."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.diagnostics import normalization_check
from qrpo_core.objective.log_partition import finite_log_partition
from qrpo_core.objective.quantiles import (
    RankCounts,
    leave_one_out_counts,
    quantile,
    rank_counts,
    rank_counts_table,
)
from qrpo_core.objective.targets import calibrated_targets, reference_targets
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")


def weak(counts):
    return quantile(counts.below, counts.equal, counts.n, "weak")


# --- 3.1 Independent sample, no ties ---


@pytest.mark.parametrize("n", [1, 2, 5])
def test_independent_sample_without_ties_has_a_rank_uniform_on_0_to_n_and_partition_z_n(n):
    """Over all orders of n + 1 distinct rewards, the first as sample: exactly, not by simulation."""
    ranks, beta = [], 0.3
    for order in itertools.permutations(range(n + 1)):
        ranks.append(weak(rank_counts(order[:1], order[1:], in_pool=False))[0])
    values, how_often = np.unique(ranks, return_counts=True)
    np.testing.assert_allclose(values, np.arange(n + 1) / n)
    assert len(set(how_often.tolist())) == 1
    z_n = np.mean(np.exp(np.array(ranks) / beta))
    assert float(finite_log_partition(IDENTITY, beta, n)) == pytest.approx(np.log(z_n), rel=1e-13)


def test_winners_target_is_log_n_plus_1_for_n_beta_small_and_not_log_1_over_beta():
    beta = 3e-4
    for n in (1, 3, 50):
        winner = rank_counts([1e9], np.arange(n), in_pool=False)
        finite = calibrated_targets(winner, transform=IDENTITY, beta=beta, normaliser="finite")
        assert finite.log_ratio[0] == pytest.approx(np.log(n + 1), rel=1e-9)
    n1 = rank_counts([1.0], [0.0], in_pool=False)
    paper = calibrated_targets(n1, transform=IDENTITY, beta=beta, normaliser="population")
    assert paper.log_ratio[0] == pytest.approx(8.1, abs=0.02)
    finite = calibrated_targets(n1, transform=IDENTITY, beta=beta, normaliser="finite")
    assert finite.log_ratio[0] == pytest.approx(0.69, abs=0.004)


# --- 3.2 A sample inside its references ---


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_sample_inside_its_references_is_uniform_on_1_to_n_and_leave_one_out_on_0_to_n_minus_1(n):
    plain, left_out = [], []
    for order in itertools.permutations(range(n)):
        plain.append(weak(rank_counts(order[:1], order, in_pool=False))[0])
        left_out.append(weak(rank_counts(order[:1], order, in_pool=True))[0])
    np.testing.assert_allclose(np.unique(plain), np.arange(1, n + 1) / n)
    # Leave-one-out is (n R_q_hat - 1)/(n - 1), normaliser Z_{n-1}.
    np.testing.assert_allclose(left_out, (n * np.array(plain) - 1) / (n - 1), atol=1e-15)
    log_z = np.log(np.mean(np.exp(np.array(left_out) / 0.2)))
    assert float(finite_log_partition(IDENTITY, 0.2, n - 1)) == pytest.approx(log_z, rel=1e-13)


def expectations(n, sample_of, in_pool):
    """Exact mean estimate by value of the sample, over all pools of n draws from three equal atoms."""
    found = {0: [], 1: [], 2: []}
    for pool in itertools.product(range(3), repeat=n):
        value, references = sample_of(pool)
        found[value].append(weak(rank_counts([value], references, in_pool=in_pool))[0])
    return {value: float(np.mean(estimates)) for value, estimates in found.items()}


def test_the_plain_estimate_of_a_sample_inside_its_references_is_biased_up_by_1_minus_q_over_n():
    n = 4
    plain = expectations(n, lambda pool: (pool[0], pool), in_pool=False)
    left_out = expectations(n, lambda pool: (pool[0], pool), in_pool=True)
    for value, q in [(0, 1 / 3), (1, 2 / 3), (2, 1.0)]:
        assert plain[value] == pytest.approx(q + (1 - q) / n)
        assert left_out[value] == pytest.approx(q)


def test_a_sample_selected_by_its_rank_needs_references_from_outside_its_pool():
    best = expectations(
        4, lambda pool: (max(pool[:2]), [max(pool[:2]), min(pool[:2]), *pool[2:]]), in_pool=True
    )
    outside = expectations(4, lambda pool: (max(pool[:2]), pool[2:]), in_pool=False)
    assert (
        best[0] > 1 / 3 + 0.1
    )  # leave-one-out is not enough: the loser of the selection is still in the pool
    assert [outside[0], outside[1], outside[2]] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_n_equal_1_self_inclusion_is_always_1_and_refused_when_left_out():
    for reward in (-3.0, 0.0, 7.0):
        assert weak(rank_counts([reward], [reward], in_pool=False))[0] == 1.0
        with pytest.raises(ObjectiveError, match="no reference to compare with"):
            rank_counts([reward], [reward], in_pool=True)


# --- 3.3 Ties ---

ATOMS = [np.array([0.7, 0.3]), np.array([0.5, 0.3, 0.2]), np.array([0.05] * 20), np.array([1.0])]


@pytest.mark.parametrize("p", ATOMS, ids=len)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_partition_under_ties_weak_at_least_mid_at_most_population_randomised_equal(p, beta):
    """Atoms p_j with distribution function F_j; rank counts in the limit of many references."""
    n = 10_000
    equal = np.round(p * n).astype(np.int64)
    below = np.cumsum(equal) - equal
    counts = RankCounts(below, equal, np.full(len(p), n))
    population = float(IDENTITY.log_partition(beta))

    def log_z(tie_method):
        q = quantile(counts.below, counts.equal, counts.n, tie_method)
        return float(np.logaddexp.reduce(np.log(p) + q / beta))

    assert log_z("weak") == pytest.approx(np.log(np.sum(p * np.exp(np.cumsum(p) / beta))), rel=1e-12)
    assert log_z("weak") > population > log_z("mid")
    # Randomised: the sum over atoms of p_j E_U exp((F_j - p_j + U p_j)/beta), in closed form, is Z itself ...
    upper = np.cumsum(p)
    pieces = np.log(beta * -np.expm1(-p / beta)) + upper / beta
    assert float(np.logaddexp.reduce(pieces)) == pytest.approx(population, rel=1e-12)
    # ... and the seeded quantiles average to it.
    draws = 100_000
    atom = np.random.default_rng(0).choice(len(p), size=draws, p=p)
    seeds = np.arange(draws, dtype=np.uint64)
    q = quantile(counts.below[atom], counts.equal[atom], counts.n[atom], "randomized", seeds)
    weights = np.exp(q / beta - population)
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(draws)


def test_when_every_reference_fails_the_papers_partition_reinforces_failures_with_log_1_over_beta():
    failing = rank_counts([0.0], np.zeros(50), in_pool=False)
    paper = calibrated_targets(
        failing, transform=IDENTITY, beta=0.003, normaliser="population", tie_tolerance=1.0
    )
    assert paper.quantile[0] == 1.0
    assert paper.log_ratio[0] == pytest.approx(5.8, abs=0.02)
    with pytest.raises(ObjectiveError, match="does not fit the weak tie method"):
        calibrated_targets(failing, transform=IDENTITY, beta=0.003, normaliser="population")


# --- 3.4 The normaliser that is right in all of these ---


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict"])
@pytest.mark.parametrize("beta", [3e-4, 0.003, 0.1, 7.0])
def test_all_references_fail_gives_target_exactly_zero(tie_method, beta):
    for n in (2, 3, 50):
        counts = rank_counts([0.0, 0.0], np.zeros(n), in_pool=False)
        inside = rank_counts([0.0], np.zeros(n), in_pool=True)
        for transform in (IDENTITY, get_transform("sqrt"), get_transform("power", exponent=3.0)):
            for ranked in (counts, inside):
                rows = len(ranked)
                targets = calibrated_targets(
                    ranked, transform=transform, beta=beta, tie_method=tie_method, prompt=np.zeros(rows, int),
                    reference_prompt=np.zeros(n, int), reference_rewards=np.zeros(n),
                )  # fmt: skip
                assert targets.normaliser == "tie_aware"
                assert (targets.target == 0.0).all()  # exactly


def test_without_ties_the_empirical_normaliser_is_the_constant_z_n_minus_1():
    rng = np.random.default_rng(0)
    n, beta = 12, 0.07
    prompt = np.repeat(np.arange(5), n)
    rewards = rng.normal(size=5 * n)
    counts = leave_one_out_counts(prompt, rewards)
    log_z = np.log(np.exp(weak(counts).reshape(5, n) / beta).mean(axis=1))
    np.testing.assert_allclose(log_z, float(finite_log_partition(IDENTITY, beta, n - 1)), rtol=1e-13)


@pytest.mark.parametrize("beta", [1e-4, 3e-3, 0.01])
def test_success_with_binary_reward_has_target_minus_log_p_whatever_beta(beta):
    n, successes = 50, 15
    rewards = np.array([1.0] * successes + [0.0] * (n - successes))
    counts = rank_counts([1.0, 0.0], rewards, in_pool=False)
    targets = calibrated_targets(
        counts,
        transform=IDENTITY,
        beta=beta,
        prompt=[0, 0],
        reference_prompt=np.zeros(n, int),
        reference_rewards=rewards,
    )
    assert targets.log_ratio[0] == pytest.approx(-np.log(successes / n), rel=1e-9)
    assert targets.log_ratio[1] < -20


# --- 3.5 The check that costs nothing ---


def binary_pools(prompts=2000, n=50, p=0.3):
    rewards = (np.random.default_rng(0).random((prompts, n)) < p).astype(float)
    return np.repeat(np.arange(prompts), n), rewards.ravel()


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict"])
def test_mean_exp_target_over_beta_of_the_references_is_1_under_the_empirical_normaliser(tie_method):
    prompt, rewards = binary_pools(200)
    for name in ("identity", "log", "normal"):
        targets = reference_targets(
            prompt, rewards, transform=get_transform(name), beta=0.1, tie_method=tie_method,
            normaliser="empirical",
        )  # fmt: skip
        check = normalization_check(targets, prompt)
        assert check.mean == pytest.approx(1.0, abs=1e-12)
        assert check.prompt_quantiles[0][1] == pytest.approx(1.0, abs=1e-12)


def test_mean_exp_target_over_beta_of_an_independent_sample_without_ties_is_1_under_the_finite_normaliser():
    n, beta = 9, 0.05
    log_z = float(finite_log_partition(IDENTITY, beta, n))
    assert np.mean(np.exp(np.arange(n + 1) / n / beta - log_z)) == pytest.approx(1.0, rel=1e-12)
    rng = np.random.default_rng(1)  # and so it is for targets made from data, up to sampling
    prompts = 4000
    counts = rank_counts_table(
        np.arange(prompts),
        rng.normal(size=prompts),
        np.repeat(np.arange(prompts), n),
        rng.normal(size=prompts * n),
        False,
    )
    targets = calibrated_targets(counts, transform=IDENTITY, beta=beta, normaliser="finite")
    check = normalization_check(targets, np.arange(prompts))
    assert abs(check.mean - 1.0) < 4 * check.standard_error
    paper = calibrated_targets(counts, transform=IDENTITY, beta=beta, normaliser="population")
    biased = normalization_check(paper, np.arange(prompts))
    assert biased.mean - 1.0 > 10 * biased.standard_error  # at n beta < 1 the paper's Z does not fit


def test_held_out_binary_rewards_have_mean_exp_target_1_empirical_and_3_5_with_the_papers_partition():
    """The tabular numbers of method.md: 1.03 against 3.46 (50 references, p = 0.3, beta = 0.1)."""
    p, (reference_prompt, rewards) = 0.3, binary_pools()
    prompts = int(reference_prompt.max()) + 1
    prompt, outcomes = np.repeat(np.arange(prompts), 2), np.tile([0.0, 1.0], prompts)
    counts = rank_counts_table(prompt, outcomes, reference_prompt, rewards, False)
    found = {}
    for normaliser in ("empirical", "population"):
        targets = calibrated_targets(
            counts, transform=IDENTITY, beta=0.1, normaliser=normaliser, prompt=prompt,
            reference_prompt=reference_prompt, reference_rewards=rewards, tie_tolerance=1.0,
        )  # fmt: skip
        found[normaliser] = float((np.exp(targets.log_ratio).reshape(-1, 2) @ [1 - p, p]).mean())
    assert found["empirical"] == pytest.approx(1.03, abs=0.03)
    assert found["population"] == pytest.approx(3.46, abs=0.1)


# --- 3.7 auto ---


def test_auto_is_tie_aware_whether_rewards_tie_or_not():
    population = float(IDENTITY.log_partition(0.1))
    for references, differs in [([0.0, 1.0, 1.0], True), ([0.0, 1.0, 2.0], False)]:
        counts = rank_counts([1.0], references, in_pool=False)
        targets = calibrated_targets(
            counts,
            transform=IDENTITY,
            beta=0.1,
            prompt=[0],
            reference_prompt=[0, 0, 0],
            reference_rewards=references,
        )
        assert targets.normaliser == "tie_aware"
        assert (abs(targets.log_partition[0] - population) > 0.1) == differs
    across = rank_counts_table([0, 1], [1.0, 1.0], [0, 0, 1, 1], [0.0, 1.0, 1.0, 0.0], False)
    targets = calibrated_targets(
        across, transform=IDENTITY, beta=0.1, prompt=[0, 1], reference_prompt=[0, 0, 1, 1],
        reference_rewards=[0.0, 1.0, 1.0, 0.0],
    )  # fmt: skip
    # Equal rewards of two prompts are no tie.
    np.testing.assert_allclose(targets.log_partition, population, rtol=1e-14)
