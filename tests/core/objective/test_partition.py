"""Partition functions: goldens, vectorised against loops, ragged against padded, the Laplace expansion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective import partition
from qrpo_core.objective.partition import (
    empirical_log_partition,
    finite_log_partition,
    laplace_log_partition,
    segment_parts,
)
from qrpo_core.objective.quantiles import quantile, rank_counts
from qrpo_core.objective.transforms import get_transform

LAW = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy

IDENTITY = get_transform("identity")


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
        log_z = float(empirical_log_partition(q[None], float(row["beta"]), IDENTITY)[0])
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


@LAW
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=6), st.floats(1e-3, 10)
)
def test_empirical_log_partition_equals_a_loop_and_does_not_read_padding(prompts, beta):
    width = max(len(row) for row in prompts) + 2
    padded = np.full((len(prompts), width), np.nan)
    for row, quantiles in enumerate(prompts):
        padded[row, : len(quantiles)] = quantiles
    log_z = empirical_log_partition(padded, beta, IDENTITY, mask=~np.isnan(padded))
    for row, quantiles in enumerate(prompts):
        u = np.array(quantiles) / beta
        assert log_z[row] == pytest.approx(
            float(np.logaddexp.reduce(u) - np.log(len(u))), rel=1e-12, abs=1e-14
        )
        alone = empirical_log_partition([quantiles[::-1]], [beta], IDENTITY)
        assert alone[0] == pytest.approx(log_z[row], rel=1e-13, abs=1e-15)


def test_ragged_sums_in_blocks_equal_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    size = rng.integers(1, 9, 50)
    offsets = np.concatenate([[0], np.cumsum(size)])
    values, segment, beta = rng.random(offsets[-1]), rng.integers(0, 50, 200), rng.uniform(0.01, 1, 200)
    whole = segment_parts(values, offsets, segment, beta)
    monkeypatch.setattr(partition, "CHUNK", 7)  # blocks of one or two rows, some segments longer than a block
    for part, expected in zip(segment_parts(values, offsets, segment, beta), whole, strict=True):
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(
        finite_log_partition(IDENTITY, beta, 5), [float(finite_log_partition(IDENTITY, b, 5)) for b in beta]
    )


def test_empirical_log_partition_clamps_by_the_references_behind_the_quantiles():
    q = np.array([[0.0, 0.5, 1.0]])
    log_z = empirical_log_partition(q, 1.0, get_transform("log"), num_references=2)
    assert log_z[0] == pytest.approx(np.log((0.5 + 0.5 + 1.0) / 3))
    with pytest.raises(ObjectiveError, match="infinite at the quantile"):
        empirical_log_partition(q, 1.0, get_transform("normal"))


@pytest.mark.parametrize("name", ["identity", "square", "sqrt", "log", "power"])
def test_laplace_expansion_is_right_to_its_order_within_its_stated_range(name):
    transform = get_transform(name, **({"exponent": 3.0} if name == "power" else {}))
    first, second = transform.slope_at_one
    edge = 0.1 * first**2 / max(first, abs(second))
    beta = edge / 2.0 ** np.arange(1, 7)
    for order in (1, 2):
        error = np.abs(laplace_log_partition(transform, beta, order) - transform.log_partition(beta))
        assert (error < 4 * (beta / edge * 0.1) ** order + 1e-7).all()
    at_edge = abs(float(laplace_log_partition(transform, edge)) - float(transform.log_partition(edge)))
    assert at_edge < 0.05


@pytest.mark.parametrize("name", ["square", "sqrt", "log"])
@pytest.mark.parametrize("order", [1, 2])
def test_laplace_error_falls_as_beta_to_the_order(name, order):
    transform, beta = get_transform(name), np.array([4e-3, 2e-3, 1e-3])
    error = np.abs(laplace_log_partition(transform, beta, order) - transform.log_partition(beta))
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
        (lambda: empirical_log_partition([0.5], 0.1, IDENTITY), "shape"),
        (lambda: empirical_log_partition([[0.5]], 0.1, IDENTITY, mask=[[True, False]]), "mask has shape"),
        (lambda: empirical_log_partition([[0.5], [0.1]], 0.1, IDENTITY, mask=[[True], [False]]), "rows 1"),
        (lambda: empirical_log_partition([[1.5]], 0.1, IDENTITY), r"\[0, 1\]"),
        (lambda: laplace_log_partition(get_transform("normal"), 0.1), "normal.*no known finite slope"),
        (lambda: laplace_log_partition(IDENTITY, 0.1, 3), "order"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()
