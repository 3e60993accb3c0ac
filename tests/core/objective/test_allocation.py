"""Planner: numbers of method.md, section 4, posteriors by hand and by simulation, allocation by force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.allocation import (
    allocate_references,
    marginal_gain,
    objective_facts,
    quantile_standard_error,
    references_needed,
    target_standard_error,
    threshold_quantile,
)
from qrpo_core.objective.quantiles import RankCounts, rank_counts, rank_counts_table
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")
LAW = settings(deadline=None, max_examples=25)  # each plans and replans


def hits(k, n):
    """Counts with k of n references at or below each sample, no ties."""
    k = np.atleast_1d(np.asarray(k))
    return RankCounts(k, np.zeros_like(k), np.full_like(k, n))


@pytest.mark.parametrize(
    ("beta", "quantile", "probability"),
    [(0.1, None, 0.9), (0.1, 0.9, 0.8), (0.1, 0.5, 0.9), (1.0, None, 0.95), (0.03, 0.99, 0.99)],
)
def test_references_needed_make_the_sign_right_by_summing_the_binomial(beta, quantile, probability):
    threshold = threshold_quantile(IDENTITY, beta)
    q = (1 + threshold) / 2 if quantile is None else quantile

    def right(n):
        chances = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
        return sum(c for k, c in enumerate(chances) if (k / n > threshold) == (q > threshold))

    needed = int(references_needed(IDENTITY, beta, quantile=quantile, probability=probability))
    assert needed == 1 or right(needed - 1) < probability
    assert min(right(n) for n in range(needed, needed + 150)) >= probability


@pytest.mark.parametrize(("beta", "needed"), [(0.1, 18), (0.01, 109), (3e-3, 287), (1e-3, 724), (3e-4, 2055)])
def test_references_needed_are_those_of_method_4(beta, needed):
    assert references_needed(IDENTITY, beta) == needed


def test_references_needed_at_the_threshold_and_beyond_counting_are_infinite():
    threshold = threshold_quantile(IDENTITY, 0.1)
    assert references_needed(IDENTITY, 0.1, quantile=threshold) == math.inf
    assert references_needed(IDENTITY, 0.1, quantile=threshold + 1e-6) == math.inf
    assert references_needed(get_transform("normal"), 0.01) == math.inf  # the threshold rounds to 1
    for changes in ({"probability": 1.0}, {"quantile": 0.0}, {"quantile": 1.5}):
        with pytest.raises(ObjectiveError, match="must lie between 0 and 1"):
            references_needed(IDENTITY, 0.1, **changes)


@pytest.mark.parametrize(("beta", "share"), [(0.1, 0.77), (1e-3, 0.993)])
def test_share_of_references_pushed_down_is_that_of_method_4(beta, share):
    assert threshold_quantile(IDENTITY, beta) == pytest.approx(share, abs=5e-4)
    assert threshold_quantile(IDENTITY, beta) == pytest.approx(
        beta * float(IDENTITY.log_partition(beta)), rel=1e-14
    )


@pytest.mark.parametrize(
    ("name", "params"), [("square", {}), ("log", {}), ("power", {"exponent": 0.3}), ("normal", {})]
)
def test_the_target_changes_sign_at_the_threshold(name, params):
    transform, beta = get_transform(name, **params), 0.4
    q, level = threshold_quantile(transform, beta), beta * float(transform.log_partition(beta))
    assert float(transform.apply(q - 1e-9)) < level < float(transform.apply(q + 1e-9))


def test_objective_facts_are_those_of_method_4():
    for beta in (3e-4, 3e-3, 0.01):
        facts = objective_facts(IDENTITY, beta)
        assert facts.largest_log_ratio == pytest.approx(-math.log(beta), abs=1e-9)
        assert facts.smallest_log_ratio == pytest.approx(-1 / beta - math.log(beta), rel=1e-9)
        assert facts.kl == pytest.approx(math.log(1 / beta) - 1, abs=1e-3)
        assert facts.pushed_down == threshold_quantile(IDENTITY, beta)
        assert facts.references_needed == references_needed(IDENTITY, beta)


def test_kl_of_the_optimum_equals_its_definition_by_quadrature():
    t = (np.arange(200_000) + 0.5) / 200_000
    for name in ("identity", "sqrt", "log"):
        transform, beta = get_transform(name), 0.2
        log_ratio = transform.apply(t) / beta - float(transform.log_partition(beta))
        assert objective_facts(transform, beta).kl == pytest.approx(
            np.mean(np.exp(log_ratio) * log_ratio), abs=1e-5
        )


def test_quantile_standard_error_by_hand():
    error = quantile_standard_error([3, 0, 10], [2, 0, 0], [10, 10, 10])
    np.testing.assert_allclose(error, [math.sqrt(0.25 / 10), 0.0, 0.0])


def test_target_standard_error_of_identity_is_the_beta_posteriors_in_nats():
    k, n, beta = np.array([0, 3, 10]), 10, 0.05
    a, b = 1 + k, 1 + n - k
    exact = np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) / beta
    np.testing.assert_allclose(
        target_standard_error(hits(k, n), transform=IDENTITY, beta=beta), exact, rtol=2e-3
    )


@pytest.mark.parametrize("name", ["log", "square", "normal"])
def test_target_standard_error_equals_simulation_from_the_posterior(name):
    transform, beta, n = get_transform(name), 0.3, 12
    k = np.array([0, 6, 12])
    draws = np.random.default_rng(0).beta(1 + k[:, None], 1 + n - k[:, None], (3, 200_000))
    simulated = (transform.apply(draws) / beta).std(axis=1)
    np.testing.assert_allclose(
        target_standard_error(hits(k, n), transform=transform, beta=beta), simulated, rtol=0.03
    )


def test_marginal_gain_is_largest_near_the_threshold_and_nothing_for_no_references():
    counts, beta = hits(np.arange(51), 50), 0.1
    gain = marginal_gain(counts, 10, transform=IDENTITY, beta=beta)
    threshold = threshold_quantile(IDENTITY, beta)
    assert abs(int(gain.argmax()) / 50 - threshold) < 0.06
    assert gain[0] < 1e-6 * gain.max()  # a clear loser
    assert (marginal_gain(counts, 0, transform=IDENTITY, beta=beta) == 0).all()


def test_marginal_gain_is_the_expected_fall_of_the_posterior_variance_by_enumeration():
    # Beta(a, b) prior, k more draws, j of them hits (beta-binomial): the mean posterior variance.
    a, b, k = 1 + 7, 1 + 10 - 7, 5

    def variance(a, b):
        return a * b / ((a + b) ** 2 * (a + b + 1))

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    after = sum(
        math.comb(k, j) * math.exp(log_beta(a + j, b + k - j) - log_beta(a, b)) * variance(a + j, b + k - j)
        for j in range(k + 1)
    )
    some, all_of_it = (
        float(marginal_gain(hits([7], 10), more, transform=IDENTITY, beta=0.1)[0]) for more in (k, 1e15)
    )
    assert some / all_of_it == pytest.approx(1 - after / variance(a, b), rel=1e-9)


@LAW
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 100))
def test_marginal_gain_grows_with_the_references_and_by_less_each_time(n, share, k):
    counts = hits([round(share * n)], n)
    gains = [float(marginal_gain(counts, k + i, transform=IDENTITY, beta=0.1)[0]) for i in range(3)]
    assert gains[0] <= gains[1] <= gains[2]
    assert gains[2] - gains[1] <= (gains[1] - gains[0]) * (1 + 1e-9) + 1e-18


@pytest.mark.parametrize("cap", [None, 2])
def test_allocation_is_the_best_of_all_allocations(cap):
    counts = RankCounts(np.array([8, 5, 3, 10]), np.zeros(4, int), np.array([10, 6, 4, 12]))
    prompt, beta, budget = np.array([4, 4, 9, 2]), 0.1, 7
    plan = allocate_references(
        prompt, counts, transform=IDENTITY, beta=beta, budget=budget, max_per_prompt=cap
    )
    assert plan.prompt.tolist() == [2, 4, 9]
    size = {2: 14, 4: 12, 9: 6}
    weight = marginal_gain(counts, 1e15, transform=IDENTITY, beta=beta)  # all of the weighted variance

    def remaining(given):
        return sum(
            weight[prompt == p].sum() * size[p] / (size[p] + g) for p, g in zip((2, 4, 9), given, strict=True)
        )

    choices = [g for g in itertools.product(range((cap or budget) + 1), repeat=3) if sum(g) <= budget]
    assert remaining(plan.additional) == pytest.approx(min(map(remaining, choices)), rel=1e-12)
    assert plan.variance_after == pytest.approx(remaining(plan.additional), rel=1e-9)
    assert plan.variance_before == pytest.approx(remaining((0, 0, 0)), rel=1e-9)


@LAW
@example(3951319, 13, 3)  # a prompt whose P(R_q > q*) is below 1e-16
@given(st.integers(0, 2**31), st.integers(0, 500), st.sampled_from([None, 0, 3, 40]))
def test_allocation_spends_the_budget_where_it_can_and_does_not_depend_on_row_order(seed, budget, cap):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 30, 12)
    counts = RankCounts(rng.integers(0, n + 1), np.zeros(12, int), n)
    prompt = rng.integers(0, 5, 12)
    arguments = {"transform": IDENTITY, "beta": 0.1, "budget": budget, "max_per_prompt": cap}
    plan = allocate_references(prompt, counts, **arguments)
    room = len(plan.prompt) * (budget if cap is None else cap)
    assert plan.additional.sum() == min(budget, room)
    assert (plan.additional >= 0).all()
    assert (plan.additional <= (budget if cap is None else cap)).all()
    assert plan.variance_after <= plan.variance_before
    order = rng.permutation(12)
    again = allocate_references(prompt[order], counts.take(order), **arguments)
    assert again.variance_after == pytest.approx(plan.variance_after, rel=1e-9)


def test_nothing_is_spent_where_all_rewards_are_equal():
    reference_prompt, rewards = np.repeat([0, 1, 2], 10), np.r_[np.zeros(10), np.arange(10.0), np.ones(10)]
    prompt, sample_rewards = np.array([0, 0, 1, 1, 2, 2]), np.array([0.0, 0.0, 8.5, 2.5, 1.0, 2.0])
    counts = rank_counts_table(prompt, sample_rewards, reference_prompt, rewards, False)
    plan = allocate_references(prompt, counts, transform=IDENTITY, beta=0.1, budget=30)
    assert plan.additional[0] == 0
    assert plan.additional[1] > 0
    assert plan.additional[2] > 0  # one sample is better than all references: not all rewards are equal
    nothing = allocate_references(
        [0], rank_counts([1.0], np.ones(5), in_pool=False), transform=IDENTITY, beta=0.1, budget=9
    )
    assert nothing.additional.tolist() == [0]


def test_equal_prompts_share_what_does_not_divide():
    plan = allocate_references(np.arange(3), hits([8, 8, 8], 10), transform=IDENTITY, beta=0.1, budget=8)
    assert sorted(plan.additional.tolist()) == [2, 3, 3]


def test_more_goes_to_the_uncertain_than_to_the_settled():
    # Both are near the threshold 0.77 of beta = 0.1; the first has 4 references, the second 400.
    counts = RankCounts(np.array([3, 308]), np.array([0, 0]), np.array([4, 400]))
    plan = allocate_references([0, 1], counts, transform=IDENTITY, beta=0.1, budget=50)
    assert plan.additional.tolist() == [50, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: allocate_references([0, 1], hits([1], 2), transform=IDENTITY, beta=0.1, budget=1),
            "unequal",
        ),
        (
            lambda: allocate_references([0], hits([1], 2), transform=IDENTITY, beta=0.1, budget=-1),
            "must be >= 0",
        ),
        (lambda: marginal_gain(hits([1], 2), -1, transform=IDENTITY, beta=0.1), ">= 0"),
        (lambda: target_standard_error(hits([1], 2), transform=IDENTITY, beta=0.0), "beta"),
        (
            lambda: references_needed(get_transform("scaled_normal", mean=[0.0], std=[1.0]), 0.1),
            "differs by prompt",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()
