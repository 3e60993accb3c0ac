"""Calibrated targets: hand-made values, one road against another, laws, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.diagnostics import normalization_check
from qrpo_core.objective.log_partition import finite_log_partition
from qrpo_core.objective.quantiles import quantile, rank_counts, rank_counts_table
from qrpo_core.objective.targets import CalibratedTargets, calibrated_targets, reference_targets
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")


def ragged(rng, prompts=40, ties=True):
    """References with 2..12 rewards a prompt and three samples a prompt, rows shuffled."""
    reference_prompt = rng.permutation(np.repeat(np.arange(prompts), rng.integers(3, 13, prompts)))
    rewards = rng.integers(0, 4, len(reference_prompt)).astype(float)
    if not ties:
        rewards = rng.permutation(len(reference_prompt)).astype(float)
    prompt = rng.permutation(np.repeat(np.arange(prompts), 3))
    sample_rewards = rng.integers(0, 4, len(prompt)) + (0.0 if ties else 0.5)
    return prompt, sample_rewards, reference_prompt, rewards


def test_hand_made_targets_of_each_normaliser():
    # Two references 0 and 1, one sample above, one below both; beta = 1.
    counts = rank_counts([2.0, -1.0], [0.0, 1.0], in_pool=False)
    common = {
        "transform": IDENTITY,
        "beta": 1.0,
        "prompt": [0, 0],
        "reference_prompt": [0, 0],
        "reference_rewards": [0.0, 1.0],
    }
    e = np.e
    for normaliser, z in [
        ("population", e - 1),  # integral of exp(t)
        ("finite", (1 + e**0.5 + e) / 3),  # k/2, k = 0..2
        ("empirical", (1 + e) / 2),  # the two references left out: quantiles 0 and 1
    ]:
        targets = calibrated_targets(counts, normaliser=normaliser, **common)
        np.testing.assert_allclose(targets.target, [1 - np.log(z), -np.log(z)], rtol=1e-14)
        np.testing.assert_allclose(targets.log_partition, np.log(z), rtol=1e-14)
        assert targets.quantile.tolist() == targets.transformed.tolist() == [1.0, 0.0]
        assert targets.normaliser == normaliser
        assert targets.positive_share == 0.5


def test_log_ratio_is_the_target_in_nats():
    counts = rank_counts([2.0], [0.0, 1.0], in_pool=False)
    targets = calibrated_targets(counts, transform=IDENTITY, beta=0.1, normaliser="population")
    assert targets.log_ratio[0] == pytest.approx(targets.target[0] / 0.1)
    assert targets.target.dtype == targets.quantile.dtype == np.float64


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict", "randomized"])
@pytest.mark.parametrize("name", ["identity", "log", "sqrt"])
@pytest.mark.parametrize("by_length", [False, True])
def test_table_of_empirical_targets_equals_a_loop_over_samples(tie_method, name, by_length):
    rng = np.random.default_rng(3)
    prompt, rewards, reference_prompt, reference_rewards = ragged(rng)
    transform = get_transform(name)
    seeds = rng.integers(0, 2**63, len(prompt)).astype(np.uint64)
    reference_seeds = rng.integers(0, 2**63, len(reference_prompt)).astype(np.uint64)
    lengths = rng.integers(1, 30, len(prompt)) if by_length else None
    counts = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, False)
    targets = calibrated_targets(
        counts, transform=transform, beta=0.3, tie_method=tie_method, normaliser="empirical", prompt=prompt,
        reference_prompt=reference_prompt, reference_rewards=reference_rewards, seeds=seeds,
        reference_seeds=reference_seeds, lengths=lengths,
    )  # fmt: skip
    for row, p in enumerate(prompt):
        held = reference_prompt == p
        beta = 0.3 / lengths[row] if by_length else 0.3
        pool = rank_counts(reference_rewards[held], reference_rewards[held], in_pool=True)
        q = quantile(pool.below, pool.equal, pool.n, tie_method, reference_seeds[held])
        log_z = np.logaddexp.reduce(transform.apply(q, pool.n) / beta) - np.log(len(q))
        one = rank_counts([rewards[row]], reference_rewards[held], in_pool=False)
        mine = quantile(one.below, one.equal, one.n, tie_method, seeds[row : row + 1])
        f = transform.apply(mine, one.n)[0]
        assert targets.log_partition[row] == pytest.approx(log_z, rel=1e-12)
        assert targets.target[row] == pytest.approx(f - beta * log_z, rel=1e-10, abs=1e-13)


def test_finite_targets_use_each_samples_own_n():
    rng = np.random.default_rng(4)
    prompt, rewards, reference_prompt, reference_rewards = ragged(rng, ties=False)
    counts = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, False)
    lengths = rng.integers(1, 5, len(prompt))
    for given_lengths in (None, lengths):
        targets = calibrated_targets(
            counts, transform=IDENTITY, beta=0.2, normaliser="finite", lengths=given_lengths
        )
        for row, n in enumerate(counts.n):
            expected = float(finite_log_partition(IDENTITY, targets.beta[row], int(n)))
            assert targets.log_partition[row] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("normaliser", ["population", "finite", "empirical"])
def test_a_transform_that_varies_by_prompt_equals_one_transform_for_each_prompt(normaliser):
    rng = np.random.default_rng(5)
    prompt, rewards, reference_prompt, reference_rewards = ragged(rng, prompts=6, ties=False)
    reference_prompt = np.concatenate([reference_prompt, np.arange(6)])  # at least four references each
    reference_rewards = np.concatenate([reference_rewards, 1000.0 + np.arange(6)])
    mean, std = rng.normal(size=6), rng.uniform(0, 2, 6)
    counts = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, False)
    arguments = {
        "beta": 0.7,
        "normaliser": normaliser,
        "reference_prompt": reference_prompt,
        "reference_rewards": reference_rewards,
    }
    together = calibrated_targets(
        counts, transform=get_transform("scaled_normal", mean=mean, std=std), prompt=prompt, **arguments
    )
    for p in range(6):
        rows = prompt == p
        one = get_transform("scaled_normal", mean=mean[p], std=std[p])
        alone = calibrated_targets(counts.take(rows), transform=one, prompt=prompt[rows], **arguments)
        np.testing.assert_allclose(together.target[rows], alone.target, rtol=1e-12, atol=1e-13)


@given(st.integers(0, 2**31), st.sampled_from(["weak", "mid", "strict"]), st.floats(1e-3, 10))
def test_targets_are_monotone_and_do_not_depend_on_row_order_or_reward_scale(seed, tie_method, beta):
    rng = np.random.default_rng(seed)
    prompt, rewards, reference_prompt, reference_rewards = ragged(rng, prompts=5)

    def make(prompt, rewards, reference_prompt, reference_rewards):
        counts = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, False)
        return calibrated_targets(
            counts, transform=IDENTITY, beta=beta, tie_method=tie_method, prompt=prompt,
            normaliser="empirical", reference_prompt=reference_prompt, reference_rewards=reference_rewards,
        ).target  # fmt: skip

    straight = make(prompt, rewards, reference_prompt, reference_rewards)
    for p in range(5):
        mine = np.lexsort((straight[prompt == p], rewards[prompt == p]))
        assert (np.diff(straight[prompt == p][mine]) >= 0).all()
    rows, held = rng.permutation(len(prompt)), rng.permutation(len(reference_prompt))
    shuffled = make(prompt[rows], rewards[rows], reference_prompt[held], reference_rewards[held])
    np.testing.assert_allclose(shuffled, straight[rows], rtol=1e-12, atol=1e-14)
    scaled = make(prompt, np.exp(3 * rewards - 5), reference_prompt, np.exp(3 * reference_rewards - 5))
    np.testing.assert_array_equal(scaled, straight)


def test_length_normalised_beta_and_its_maximum_are_explicit_and_counted():
    counts = rank_counts([2.0] * 3, [0.0, 1.0], in_pool=False)
    lengths = [1, 10, 100]
    free = calibrated_targets(counts, transform=IDENTITY, beta=5.0, normaliser="population", lengths=lengths)
    assert free.beta.tolist() == [5.0, 0.5, 0.05]
    assert free.beta_max_bound == 0
    np.testing.assert_allclose(free.log_partition, IDENTITY.log_partition(free.beta))
    bound = calibrated_targets(
        counts, transform=IDENTITY, beta=5.0, normaliser="population", lengths=lengths, beta_max=0.1
    )
    assert bound.beta.tolist() == [0.1, 0.1, 0.05]
    assert bound.beta_max_bound == 2


@pytest.mark.parametrize("beta", [1e-5, 3e-4, 1e3])
def test_targets_stay_exact_at_extreme_beta(beta):
    counts = rank_counts([1.0, 0.0], [0.25, 0.5, 0.75], in_pool=False)
    targets = calibrated_targets(counts, transform=IDENTITY, beta=beta, normaliser="population")
    # top - bottom is f(1) - f(0) whatever the normaliser; top is -beta log(Z exp(-1/beta))
    assert targets.target[0] - targets.target[1] == pytest.approx(1.0, rel=1e-12)
    top = -beta * (np.log(beta) + np.log(-np.expm1(-1 / beta)))
    assert targets.target[0] == pytest.approx(top, rel=1e-9)


def test_reference_targets_are_the_targets_of_the_references_left_out():
    rng = np.random.default_rng(6)
    _, _, reference_prompt, rewards = ragged(rng)
    short = reference_targets(reference_prompt, rewards, transform=IDENTITY, beta=0.1)
    counts = rank_counts_table(reference_prompt, rewards, reference_prompt, rewards, True)
    long = calibrated_targets(
        counts, transform=IDENTITY, beta=0.1, prompt=reference_prompt, reference_prompt=reference_prompt,
        reference_rewards=rewards,
    )  # fmt: skip
    np.testing.assert_array_equal(short.target, long.target)
    assert short.normaliser == "tie_aware"


def check(log_ratio, prompt):
    log_ratio = np.asarray(log_ratio, dtype=np.float64)
    ones = np.ones_like(log_ratio)
    return normalization_check(
        CalibratedTargets(ones, ones, ones, ones, log_ratio, "weak", "population", 0), prompt
    )


def test_normalization_check_is_the_mean_of_prompt_means_by_hand():
    result = check(np.log([1.0, 3.0, 4.0]), [7, 7, 2])  # prompt means 2 and 4
    assert result.mean == pytest.approx(3.0)
    assert result.log_mean == pytest.approx(np.log(3.0))
    assert result.standard_error == pytest.approx(np.std([2, 4], ddof=1) / np.sqrt(2))
    assert (result.prompts, result.references) == (2, 3)
    assert dict(result.prompt_quantiles)[0.0] == pytest.approx(2.0)
    assert dict(result.prompt_quantiles)[1.0] == pytest.approx(4.0)


def test_normalization_check_reports_overflow_as_infinity_and_never_warns():
    result = check([5000.0, 0.0, -1e6, -1e6], [0, 1, 2, 2])
    assert result.mean == result.standard_error == np.inf
    assert result.log_mean == pytest.approx(5000 - np.log(3))
    assert dict(result.prompt_quantiles)[0.5] == pytest.approx(1.0)
    tiny = check([-1e6, -1e6], [0, 1])
    assert (tiny.mean, tiny.standard_error) == (0.0, 0.0)
    assert np.isnan(check([0.0, 0.0], [0, 0]).standard_error)  # one prompt: no spread to see


TIED = {"reference_prompt": [0, 0, 0], "reference_rewards": [0.0, 0.0, 1.0]}


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict"])
@pytest.mark.parametrize("normaliser", ["population", "finite"])
def test_tie_methods_that_do_not_fit_the_normaliser_are_refused_under_ties(tie_method, normaliser):
    counts = rank_counts([1.0], [0.0, 0.0, 1.0], in_pool=False)
    arguments = {"transform": IDENTITY, "beta": 0.1, "tie_method": tie_method, "normaliser": normaliser}
    message = f"{normaliser} normaliser does not fit the {tie_method} tie method.*66.7% .*tie_aware"
    with pytest.raises(ObjectiveError, match=message):
        calibrated_targets(counts, **arguments, **TIED)
    with pytest.raises(ObjectiveError, match="does not fit"):  # without references the samples show the tie
        calibrated_targets(counts, **arguments)
    published = calibrated_targets(counts, **arguments, **TIED, tie_tolerance=1.0)
    assert published.normaliser == normaliser


def test_randomized_fits_the_population_normaliser_under_ties_and_not_the_finite_one():
    counts = rank_counts([0.0], [0.0, 0.0, 1.0], in_pool=False)
    arguments = {
        "transform": IDENTITY,
        "beta": 0.1,
        "tie_method": "randomized",
        "seeds": np.array([1], dtype=np.uint64),
    }
    assert calibrated_targets(counts, normaliser="population", **arguments, **TIED).normaliser == "population"
    with pytest.raises(ObjectiveError, match="finite normaliser does not fit the randomized"):
        calibrated_targets(counts, normaliser="finite", **arguments, **TIED)


def test_a_few_duplicates_among_continuous_rewards_are_tolerated():
    rewards = np.arange(1000.0)
    rewards[1] = rewards[0]  # two of 1000 tied
    counts = rank_counts([3.5], rewards, in_pool=False)
    arguments = {
        "transform": IDENTITY,
        "beta": 0.1,
        "reference_prompt": np.zeros(1000, int),
        "reference_rewards": rewards,
    }
    assert calibrated_targets(counts, normaliser="population", **arguments).normaliser == "population"
    with pytest.raises(ObjectiveError, match=r"0.2%"):
        calibrated_targets(counts, normaliser="population", tie_tolerance=0.001, **arguments)


COUNTS = rank_counts([1.0, 2.0], [0.0, 1.5, 3.0], in_pool=False)
BASE = {"transform": IDENTITY, "beta": 0.1, "normaliser": "population"}
HELD = {"prompt": [0, 0], "reference_prompt": [0, 0, 0], "reference_rewards": [0.0, 1.5, 3.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be finite and > 0"),
        ({"beta": [0.1, -0.1]}, "got -0.1"),
        ({"beta": [0.1]}, "beta has shape"),
        ({"lengths": [1]}, "lengths must be 2"),
        ({"lengths": [0, 3]}, ">= 1"),
        ({"beta_max": 0.1}, "no lengths"),
        ({"lengths": [1, 2], "beta_max": 0.0}, "beta must be"),
        ({"prompt": [0]}, "unequal length"),
        ({"normaliser": "paper"}, "unknown normaliser 'paper'.*auto"),
        ({"normaliser": "auto"}, "auto normaliser needs reference_prompt and reference_rewards"),
        ({"normaliser": "empirical"}, "empirical normaliser needs prompt"),
        ({"normaliser": "empirical", "prompt": [0, 0]}, "needs reference_prompt"),
        ({"reference_prompt": [0]}, "go together"),
        ({**HELD, "reference_rewards": [0.0, 1.0]}, "unequal length"),
        ({**HELD, "reference_rewards": [0.0, np.nan, 1.0]}, "row 1: nan"),
        ({**HELD, "normaliser": "empirical", "prompt": [0, 4]}, "prompt codes 4"),
        ({"tie_method": "randomized"}, "needs a seed"),
        (
            {**HELD, "normaliser": "empirical", "tie_method": "randomized", "seeds": np.array([1, 2])},
            "needs a seed",
        ),
        ({"transform": get_transform("scaled_normal", mean=[0.0], std=[1.0])}, "needs prompt"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ObjectiveError, match=message):
        calibrated_targets(COUNTS, **{**BASE, **changes})


def test_prompts_with_too_few_references_are_named():
    counts = rank_counts_table([3, 8], [0.5, 0.5], [3, 3, 8], [0.0, 1.0, 0.0], False)
    held = {"prompt": [3, 8], "reference_prompt": [3, 3, 8], "reference_rewards": [0.0, 1.0, 0.0]}
    with pytest.raises(ObjectiveError, match=r"1 prompts have one reference.*prompt codes 8"):
        calibrated_targets(counts, transform=IDENTITY, beta=0.1, normaliser="empirical", **held)
    with pytest.raises(ObjectiveError, match=r"'log' needs at least 2.*n = 1 \[prompt codes 8, references\]"):
        calibrated_targets(counts, transform=get_transform("log"), beta=0.1, normaliser="population", **held)
    two = rank_counts([0.5], [0.0, 1.0], in_pool=False)
    with pytest.raises(ObjectiveError, match=r"'log' needs at least 2.*left when one is ranked"):
        calibrated_targets(
            two, transform=get_transform("log"), beta=0.1, normaliser="empirical", prompt=[0],
            reference_prompt=[0, 0], reference_rewards=[0.0, 1.0],
        )  # fmt: skip
