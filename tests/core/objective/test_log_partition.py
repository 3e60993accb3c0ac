"""Partition functions: goldens, vectorised against loops, the Laplace expansion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective import log_partition
from qrpo_core.objective.log_partition import (
    finite_log_partition,
    segment_sums,
)
from qrpo_core.objective.quantiles import quantile, rank_counts
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")


def log_means(segments, beta):
    """log mean exp(v/beta) of each segment, [segments]."""
    offsets = np.cumsum([0, *map(len, segments)])
    betas = np.full(len(segments), beta)
    top, rest = segment_sums(np.concatenate(segments), offsets, np.arange(len(segments)), betas)
    return top / betas + rest


def test_finite_log_partition_equals_the_golden_values(golden):
    for row in golden["finite_reference_log_partition_identity"]:
        log_z = float(finite_log_partition(IDENTITY, float(row["beta"]), row["num_reference"]))
        assert log_z == pytest.approx(float(row["log_z"]), rel=1e-12, abs=0), row


def test_empirical_log_partition_equals_the_golden_values_from_rewards_on(golden):
    for row in golden["empirical_log_partition_identity"]:
        rewards = row["reference_rewards"]
        counts = rank_counts(rewards, rewards, in_pool=False)
        q = quantile(counts.below, counts.equal, counts.n, row["convention"])
        np.testing.assert_array_equal(q, [float(value) for value in row["quantiles"]])
        log_z = float(log_means([IDENTITY.apply(q)], float(row["beta"]))[0])
        assert log_z == pytest.approx(float(row["log_z"]), rel=1e-12, abs=1e-15), row


@pytest.mark.parametrize("name", ["identity", "log", "normal", "sqrt"])
def test_finite_log_partition_equals_a_loop(name):
    transform = get_transform(name)
    n = np.array([[3], [4], [50]])
    beta = np.array([0.3, 1.0, 7.0])
    table = finite_log_partition(transform, beta, n)
    assert table.shape == (3, 3)
    for i, count in enumerate(n.ravel()):
        for j, one in enumerate(beta):
            values = [float(transform.apply(k / count, count)) for k in range(count + 1)]
            assert table[i, j] == pytest.approx(np.log(np.mean(np.exp(np.array(values) / one))), rel=1e-12)


def test_finite_tends_to_population_as_references_grow():
    for name in ("identity", "square", "sqrt"):
        transform = get_transform(name)
        gap = finite_log_partition(transform, 0.2, np.array([100, 200, 400])) - transform.log_partition(0.2)
        assert abs(gap[-1]) < 0.02
        np.testing.assert_allclose(gap[:-1] / gap[1:], 2.0, rtol=0.05)  # falls as 1/n


@pytest.mark.parametrize("beta", [1e-5, 3e-4, 0.1, 1e3])
def test_large_and_small_beta_neither_overflow_nor_lose_digits(beta):
    # n = 1: (1 + exp(1/beta))/2 by hand
    assert float(finite_log_partition(IDENTITY, beta, 1)) == pytest.approx(
        float(np.logaddexp(0.0, 1 / beta) - np.log(2)), rel=1e-12
    )


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=6), st.floats(1e-3, 10)
)
def test_segment_sums_equal_a_loop_and_do_not_depend_on_the_order_within_a_segment(prompts, beta):
    log_z = log_means(prompts, beta)
    for row, values in enumerate(prompts):
        u = np.array(values) / beta
        assert log_z[row] == pytest.approx(
            float(np.logaddexp.reduce(u) - np.log(len(u))), rel=1e-12, abs=1e-14
        )
        assert log_means([values[::-1]], beta)[0] == pytest.approx(log_z[row], rel=1e-13, abs=1e-15)


def test_ragged_sums_in_blocks_equal_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    size = rng.integers(1, 9, 50)
    offsets = np.concatenate([[0], np.cumsum(size)])
    values, segment, beta = rng.random(offsets[-1]), rng.integers(0, 50, 200), rng.uniform(0.01, 1, 200)
    whole = segment_sums(values, offsets, segment, beta)
    monkeypatch.setattr(log_partition, "CHUNK", 7)  # chunks of one or two rows, some segments longer
    for part, expected in zip(segment_sums(values, offsets, segment, beta), whole, strict=True):
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(
        finite_log_partition(IDENTITY, beta, 5), [float(finite_log_partition(IDENTITY, b, 5)) for b in beta]
    )


def test_an_infinite_value_is_refused():
    values = get_transform("log").apply(np.array([0.0, 0.5, 1.0]), 2)
    assert log_means([values], 1.0)[0] == pytest.approx(np.log((0.5 + 0.5 + 1.0) / 3))
    with pytest.raises(ObjectiveError, match="infinite at the quantile"):
        log_means([get_transform("normal").apply([0.0, 0.5, 1.0])], 1.0)


# f(1) = 1 or 0 (log), f'(1) and f''(1).
ENDS = {
    "identity": (1, 1, 0),
    "square": (1, 2, 2),
    "sqrt": (1, 0.5, -0.25),
    "log": (0, 1, -1),
    "power": (1, 3, 6),
}


def laplace(name, beta, order):
    """Section 2c: log Z = f(1)/beta + log(beta/f'(1)) + beta f''(1)/f'(1)^2, the last from order 2."""
    value, first, second = ENDS[name]
    return value / beta + np.log(beta / first) + (order == 2) * beta * second / first**2


@pytest.mark.parametrize("name", ENDS)
def test_laplace_expansion_is_right_to_its_order_for_small_beta(name):
    transform = get_transform(name, **({"exponent": 3.0} if name == "power" else {}))
    _, first, second = ENDS[name]
    edge = 0.1 * first**2 / max(first, abs(second))
    beta = edge / 2.0 ** np.arange(1, 7)
    for order in (1, 2):
        error = np.abs(laplace(name, beta, order) - transform.log_partition(beta))
        assert (error < 4 * (beta / edge * 0.1) ** order + 1e-7).all()
    assert abs(float(laplace(name, edge, 2)) - float(transform.log_partition(edge))) < 0.05


@pytest.mark.parametrize("name", ["square", "sqrt", "log"])
@pytest.mark.parametrize("order", [1, 2])
def test_laplace_error_falls_as_beta_to_the_order(name, order):
    beta = np.array([4e-3, 2e-3, 1e-3])
    error = np.abs(laplace(name, beta, order) - get_transform(name).log_partition(beta))
    np.testing.assert_allclose(error[:-1] / error[1:], 2.0**order, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finite_log_partition(IDENTITY, 0.1, 0), "integers >= 1"),
        (lambda: finite_log_partition(IDENTITY, 0.1, 2.5), "integers >= 1"),
        (lambda: finite_log_partition(IDENTITY, -0.1, 2), "beta"),
        (lambda: finite_log_partition(get_transform("log"), 0.1, 1), "log"),
        (
            lambda: finite_log_partition(get_transform("scaled_normal", mean=[0.0], std=[1.0]), 1, 3),
            "differs by prompt",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()
