"""What further references are expected to change."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_law

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.allocation import threshold_quantile
from qrpo_core.objective.more_references import chance_of_signal, expected_signs
from qrpo_core.objective.quantiles import RankCounts, leave_one_out_counts
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")


def counts(*hits_of: tuple[int, int]) -> RankCounts:
    hits, n = np.array(hits_of).T
    return RankCounts(hits, np.zeros_like(hits), n)


def test_as_they_are_by_hand() -> None:
    """Targets at 7/7, 3/7 and 0/7 against q* = 0.77 at beta 0.1: the first alone is positive."""
    threshold = threshold_quantile(IDENTITY, 0.1)
    found = expected_signs(counts((7, 7), (3, 7), (0, 7)), transform=IDENTITY, beta=0.1)
    true = [beta_law(1 + hits, 8 - hits).sf(threshold) for hits in (7, 3, 0)]
    assert found.above == pytest.approx(1 / 3)
    assert found.right_above == pytest.approx(true[0])
    assert found.right == pytest.approx((true[0] + 1 - true[1] + 1 - true[2]) / 3)


def test_further_references_by_simulation() -> None:
    """Draw R_q from the posterior, further hits from it, and count."""
    rng, draws = np.random.default_rng(0), 200_000
    threshold = threshold_quantile(IDENTITY, 0.1)
    quantile = rng.beta(1 + 6, 1 + 1, draws)
    estimate = (6 + rng.binomial(10, quantile)) / 17
    right = ((estimate > threshold) == (quantile > threshold)).mean()
    found = expected_signs(counts((6, 7)), transform=IDENTITY, beta=0.1, additional=10)
    error = math.sqrt(0.25 / draws)
    assert found.right == pytest.approx(right, abs=5 * error)
    assert found.above == pytest.approx((estimate > threshold).mean(), abs=5 * error)


@given(st.integers(2, 30), st.sampled_from([0.01, 0.1, 1.0]), st.integers(0, 2**31))
def test_shares_are_shares_and_very_many_references_settle_every_sign(n: int, beta: float, seed: int) -> None:
    ranks = leave_one_out_counts(np.zeros(n, np.int64), np.random.default_rng(seed).integers(0, 5, n))
    for more in (0, 1, 10):
        found = expected_signs(ranks, transform=IDENTITY, beta=beta, additional=more)
        assert 0 <= found.above <= 1
        assert 0 <= found.right <= 1
    # R_q has a density of at most n + 1, and its estimate an error of at most 0.5/sqrt(2000).
    settled = expected_signs(ranks, transform=IDENTITY, beta=beta, additional=2000)
    assert settled.right >= 1 - 2 * (n + 1) * 0.5 / math.sqrt(2000)


def test_the_chance_of_a_signal_by_simulation() -> None:
    """Pass rates are Beta(0.3, 0.3) over prompts: about a fifth of the stuck prompts moves in 10 more."""
    rng, prompts = np.random.default_rng(0), 4000
    rewards = (rng.random((prompts, 18)) < rng.beta(0.3, 0.3, prompts)[:, None]).astype(float)
    stuck = rewards[:, :8].min(1) == rewards[:, :8].max(1)
    moves = rewards[stuck].min(1) != rewards[stuck].max(1)
    found = chance_of_signal(np.repeat(np.arange(prompts), 8), rewards[:, :8].ravel(), 10)
    assert len(found) == stuck.sum()
    # The fit of two parameters adds about the error of the count once more.
    assert found.mean() == pytest.approx(moves.mean(), abs=3 * math.sqrt(2 * 0.25 / stuck.sum()))


def test_where_nearly_all_are_stuck_little_is_promised() -> None:
    prompts = np.repeat(np.arange(50), 8)
    assert chance_of_signal(prompts, np.repeat(np.arange(50) % 2, 8), 10).max() < 0.02
    mixed = np.where(
        prompts < 48, np.arange(400) % 2, 0
    )  # two stuck prompts among many that are half and half
    assert chance_of_signal(prompts, mixed, 10).min() > 0.9
    assert len(chance_of_signal(prompts, np.arange(400), 10)) == 0
    assert chance_of_signal([0, 0], [1.0, 1.0], 0).tolist() == [0.0]


def test_refusals() -> None:
    with pytest.raises(ObjectiveError, match="further references"):
        expected_signs(counts((1, 2)), transform=IDENTITY, beta=0.1, additional=-1)
    with pytest.raises(ObjectiveError, match="further references"):
        chance_of_signal([0, 0], [1.0, 1.0], -1)
