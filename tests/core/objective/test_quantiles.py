"""Rank counts and quantiles: hand-made values, table against loop, laws, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective import references as references_module
from qrpo_core.objective.quantiles import (
    TIE_METHODS,
    RankCounts,
    exchangeable_quantile,
    leave_one_out_counts,
    quantile,
    quantile_interval,
    rank_counts,
    rank_counts_table,
    tie_rate,
    uniform_from_seed,
)

# A table of references: (prompt code, reward) rows in any order; small integers make ties common.
TABLES = st.lists(
    st.tuples(st.sampled_from([-7, 0, 3, 4, 10**12]), st.integers(0, 4)), min_size=1, max_size=40
)


def columns(counts):
    return counts.below.tolist(), counts.equal.tolist(), counts.n.tolist()


def loop(prompt, rewards, reference_prompt, reference_rewards, in_pool):
    """The definition, one sample and one reference at a time."""
    out = []
    for p, r in zip(prompt, rewards, strict=True):
        mine = [s for q, s in zip(reference_prompt, reference_rewards, strict=True) if q == p]
        below, equal = sum(s < r for s in mine), sum(s == r for s in mine)
        out.append((below, equal - in_pool, len(mine) - in_pool))
    return tuple(map(list, zip(*out, strict=True)))


def test_hand_made_counts_and_quantiles():
    counts = rank_counts([2.0, 0.0, 5.0, 3.0], [1.0, 2.0, 2.0, 4.0], in_pool=False)
    assert columns(counts) == ([1, 0, 4, 3], [2, 0, 0, 0], [4, 4, 4, 4])
    assert quantile(counts.below, counts.equal, counts.n, "weak").tolist() == [0.75, 0.0, 1.0, 0.75]
    assert quantile(counts.below, counts.equal, counts.n, "mid").tolist() == [0.5, 0.0, 1.0, 0.75]
    assert quantile(counts.below, counts.equal, counts.n, "strict").tolist() == [0.25, 0.0, 1.0, 0.75]


def test_hand_made_counts_of_a_sample_inside_its_pool():
    counts = rank_counts([2.0, 4.0, 1.0], [1.0, 2.0, 2.0, 4.0], in_pool=True)
    assert columns(counts) == ([1, 3, 0], [1, 0, 0], [3, 3, 3])
    both = rank_counts_table([0, 0], [2.0, 2.0], [0] * 4, [1.0, 2.0, 2.0, 4.0], np.array([True, False]))
    assert columns(both) == ([1, 1], [1, 2], [3, 4])


@given(TABLES, st.booleans(), st.randoms(use_true_random=False))
def test_table_equals_the_loop_over_samples_and_references(table, in_pool, random):
    reference_prompt, reference_rewards = map(list, zip(*table, strict=True))
    if in_pool:
        rows = [row for row in table if reference_prompt.count(row[0]) > 1]
    else:
        rows = [(p, r + random.choice([0, 0.5, -1])) for p, r in table]
    random.shuffle(rows)
    if rows:
        prompt, rewards = map(list, zip(*rows, strict=True))
        counts = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, in_pool)
        assert columns(counts) == loop(prompt, rewards, reference_prompt, reference_rewards, in_pool)


def test_large_ragged_table_equals_one_call_for_each_prompt(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(references_module, "CHUNK", 97)  # many blocks
    reference_prompt = rng.integers(0, 60, 3000)
    reference_rewards = np.round(rng.normal(size=3000), 1)
    prompt, rewards = rng.permutation(np.repeat(np.arange(60), 5)), np.round(rng.normal(size=300), 1)
    table = rank_counts_table(prompt, rewards, reference_prompt, reference_rewards, False)
    pool = leave_one_out_counts(reference_prompt, reference_rewards)
    for p in range(60):
        rows, held = prompt == p, reference_prompt == p
        one = rank_counts(rewards[rows], reference_rewards[held], in_pool=False)
        assert columns(table.take(rows)) == columns(one)
        inside = rank_counts(reference_rewards[held], reference_rewards[held], in_pool=True)
        assert columns(pool.take(held)) == columns(inside)


@given(TABLES)
def test_leave_one_out_by_runs_equals_leave_one_out_by_search(table):
    prompt, rewards = map(list, zip(*table, strict=True))
    if min(prompt.count(p) for p in prompt) > 1:
        by_runs = leave_one_out_counts(prompt, rewards)
        assert columns(by_runs) == columns(rank_counts_table(prompt, rewards, prompt, rewards, True))
        assert tie_rate(prompt, rewards) == float((by_runs.equal > 0).mean())


@given(TABLES, st.randoms(use_true_random=False))
def test_order_of_rows_and_names_of_prompts_do_not_matter(table, random):
    prompt, rewards = map(np.array, zip(*table, strict=True))
    straight = columns(rank_counts_table(prompt, rewards, prompt, rewards, False))
    order = np.array(random.sample(range(len(table)), len(table)))
    shuffled = rank_counts_table(prompt, rewards, prompt[order], rewards[order], False)
    assert columns(shuffled) == straight
    names = {code: random.randrange(-(10**15), 10**15) for code in sorted(set(prompt.tolist()))}
    renamed = np.array([names[code] for code in prompt.tolist()])
    if len(set(names.values())) == len(names):
        assert columns(rank_counts_table(renamed, rewards, renamed, rewards, False)) == straight


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=30),
    st.lists(st.floats(1e-3, 1e6), min_size=41, max_size=41),
)
def test_quantiles_do_not_change_under_an_increasing_map_of_the_reward(rewards, steps):
    levels = np.cumsum(steps)  # any strictly increasing map of -20..20
    mapped = levels[np.array(rewards) + 20]
    before = rank_counts(rewards, rewards, in_pool=False)
    assert columns(rank_counts(mapped, mapped, in_pool=False)) == columns(before)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), min_size=2, max_size=20)
)
def test_quantiles_are_monotone_in_the_reward_and_ordered_by_tie_method(references, rewards):
    rewards = sorted(rewards)
    counts = rank_counts(rewards, references, in_pool=False)
    seeds = np.arange(len(rewards), dtype=np.uint64)
    q = {c: quantile(counts.below, counts.equal, counts.n, c, seeds) for c in TIE_METHODS}
    for tie_method in ("weak", "mid", "strict"):
        assert (np.diff(q[tie_method]) >= 0).all()
    assert (q["strict"] <= q["randomized"]).all()
    assert (q["randomized"] <= q["weak"]).all()
    np.testing.assert_allclose(q["mid"], (q["strict"] + q["weak"]) / 2, rtol=1e-15)
    # A better reward never ranks below a worse one, whatever the seeds.
    better = np.array(rewards)[:, None] < np.array(rewards)
    assert (q["randomized"][:, None] <= q["randomized"] + ~better).all()


def test_randomized_quantiles_are_a_function_of_the_seed_and_uniform_over_the_atom():
    rows = 4000
    seeds = np.arange(rows, dtype=np.uint64)
    draw = quantile(np.full(rows, 2), np.full(rows, 5), np.full(rows, 10), "randomized", seeds)
    order = np.random.default_rng(0).permutation(rows)
    shuffled = quantile(np.full(rows, 2), np.full(rows, 5), np.full(rows, 10), "randomized", seeds[order])
    np.testing.assert_array_equal(shuffled, draw[order])
    position = np.sort((draw - 0.2) / 0.5)
    assert np.abs(position - (np.arange(rows) + 0.5) / rows).max() < 1.63 / np.sqrt(rows)  # KS at 1 %
    assert len(set(draw.tolist())) == rows


def test_uniforms_from_seeds_are_splitmix64():
    # First outputs of splitmix64 with state 0 and 1 (Vigna): 0xE220A8397B1DCDAF, 0x910A2DEC89025CC1
    uniform = uniform_from_seed(np.array([0, 1, 2**64 - 1], dtype=np.uint64))
    assert uniform[:2].tolist() == pytest.approx(
        [0xE220A8397B1DCDAF / 2**64, 0x910A2DEC89025CC1 / 2**64], abs=2e-16
    )
    assert ((uniform > 0) & (uniform < 1)).all()


def test_exchangeable_quantile_is_uniform_for_every_multiset_of_rewards():
    # Sample and references are the same multiset in random order; the mean of U over each atom is exact.
    for pool in itertools.combinations_with_replacement(range(3), 4):
        edges = []
        for i, sample in enumerate(pool):
            counts = rank_counts([sample], [r for j, r in enumerate(pool) if j != i], in_pool=False)
            low = counts.below[0] / (counts.n[0] + 1)
            edges.append((low, low + (counts.equal[0] + 1) / (counts.n[0] + 1)))
        t = np.linspace(0.01, 0.99, 50)
        cdf = np.mean([np.clip((t - a) / (b - a), 0, 1) for a, b in edges], axis=0)
        np.testing.assert_allclose(cdf, t, atol=1e-12)
    counts = RankCounts(np.array([1, 1]), np.array([2, 2]), np.array([4, 4]))
    seeds = np.array([0, 1], dtype=np.uint64)
    np.testing.assert_allclose(exchangeable_quantile(counts, seeds), (1 + uniform_from_seed(seeds) * 3) / 5)


def test_interval_is_clopper_pearson_by_hand():
    low, high = quantile_interval([0, 10, 3], [0, 0, 2], [10, 10, 10], 0.95)
    # 0 and 10 hits in 10: 1 - 0.025^(1/10); 5 in 10: the textbook (0.187, 0.813)
    np.testing.assert_allclose(low, [0.0, 0.025**0.1, 0.18708603], atol=1e-8)
    np.testing.assert_allclose(high, [1 - 0.025**0.1, 1.0, 0.81291397], atol=1e-8)


@given(st.integers(1, 30), st.floats(0.01, 0.99), st.sampled_from([0.8, 0.95]))
def test_interval_covers_at_least_its_level_whatever_the_quantile(n, q, level):
    hits = np.arange(n + 1)
    binomial = np.array([math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)])
    low, high = quantile_interval(hits, np.zeros_like(hits), np.full(n + 1, n), level)
    assert binomial[(low <= q) & (q <= high)].sum() >= level - 1e-9


def test_nan_and_infinite_rewards_are_refused_with_row_value_and_id():
    rewards, ids = [0.0, np.nan, 1.0, np.inf], ["a", "b", "c", "d"]
    with pytest.raises(ObjectiveError, match=r"2 of 4 rewards.*row 1 = b: nan, row 3 = d: inf"):
        rank_counts(rewards, [0.0, 1.0], False, ids=ids)
    with pytest.raises(ObjectiveError, match=r"7 of 7 reference rewards.*row 4: nan and 2 more"):
        rank_counts([0.0], [np.nan] * 7, False)
    with pytest.raises(ObjectiveError, match="3 rows and ids has 1"):
        rank_counts([0.0, 1.0, 2.0], [0.0], False, ids=["a"])


def test_prompts_without_a_reference_are_refused_by_code():
    with pytest.raises(ObjectiveError, match=r"2 prompts have no reference.*prompt codes 5, 9"):
        rank_counts_table([5, 1, 9, 9], np.zeros(4), [1, 1, 10**15], np.zeros(3), False)
    with pytest.raises(ObjectiveError, match=r"prompt codes 2"):
        rank_counts_table([1, 2], [0.0, 0.0], [1, 1, 2], [0.0, 0.0, 0.0], True)
    with pytest.raises(ObjectiveError, match=r"prompt codes 0"):
        rank_counts([1.0], [], False)
    with pytest.raises(ObjectiveError, match=r"1 prompts have no reference.*prompt codes 4"):
        leave_one_out_counts([3, 3, 4], [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_counts([2.5], [1.0, 2.0], True), "row 0.*in_pool = False"),
        (lambda: rank_counts_table([0, 0], [1.0], [0], [1.0], False), "unequal length"),
        (lambda: rank_counts_table([0], [1.0], [0, 0], [1.0], False), "unequal length"),
        (lambda: rank_counts_table([0.0], [1.0], [0], [1.0], False), "integer array"),
        (lambda: rank_counts_table([0], [1.0], [0], [1.0], np.array([True, False])), "in_pool has shape"),
        (lambda: rank_counts([[1.0]], [1.0], False), "one-dimensional"),
        (lambda: RankCounts(np.array([1]), np.array([1]), np.array([1])), "rows 0"),
        (lambda: RankCounts(np.array([0]), np.array([0]), np.array([0])), "n >= 1"),
        (lambda: quantile([0], [0], [1], "upper"), "unknown tie method 'upper'.*randomized"),
        (lambda: quantile([0], [0], [1], "randomized"), "needs a seed"),
        (lambda: quantile([0], [0], [1], "randomized", np.array([0.5])), "seeds must be 1 integers"),
        (lambda: quantile([0], [0], [1], "randomized", np.array([1, 2])), "seeds must be 1 integers"),
        (lambda: quantile_interval([0], [0], [1], 1.0), "level"),
        (lambda: tie_rate([], []), "no reference rewards"),
    ],
)
def test_what_cannot_be_ranked_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()


def test_no_samples_give_empty_counts():
    assert len(rank_counts_table([], [], [0, 0], [1.0, 2.0], False)) == 0


def test_negative_zero_equals_zero():
    assert columns(rank_counts([-0.0], [0.0, 0.0, 1.0], in_pool=True)) == ([0], [1], [2])
