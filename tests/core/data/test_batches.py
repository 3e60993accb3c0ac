"""The laws of a plan: what a step holds, and how it is cut."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.data.batches import PASS_TOKENS, MicroBatch, StepPlan, epoch_order, plan_step
from qrpo_core.errors import ConfigError

WIDTHS = st.lists(st.integers(1, 900), min_size=1, max_size=40).map(np.array)
PROCESSES = st.integers(1, 5)
TOKENS = st.none() | st.integers(1, 4000)
ITEMS = st.none() | st.integers(1, 9)


def plan(widths: np.ndarray, processes: int, tokens: int | None, items: int | None) -> list[list[MicroBatch]]:
    return plan_step(np.arange(len(widths)), widths, processes=processes, max_tokens=tokens, max_items=items)


@given(WIDTHS, PROCESSES, TOKENS, ITEMS)
def test_every_item_counts_exactly_once_and_budgets_hold(
    widths: np.ndarray, processes: int, tokens: int | None, items: int | None
) -> None:
    shares = plan(widths, processes, tokens, items)
    assert len(shares) == processes
    assert len({len(share) for share in shares}) == 1, "every process gets the same number of passes"
    counted = Counter(item for share in shares for batch in share for item in batch.items if batch.weight)
    assert counted == Counter(range(len(widths)))
    for batch in itertools.chain(*shares):
        assert batch.width == max(widths[list(batch.items)])
        assert items is None or len(batch.items) <= items
        assert tokens is None or batch.tokens <= tokens or len(batch.items) == 1
        assert batch.weight or len(batch.items) == 1


@given(WIDTHS, PROCESSES, TOKENS, ITEMS)
def test_shares_differ_by_one_item_and_by_the_longest_items_tokens(
    widths: np.ndarray, processes: int, tokens: int | None, items: int | None
) -> None:
    shares = plan(widths, processes, tokens, items)
    held = [[i for batch in share if batch.weight for i in batch.items] for share in shares]
    counts, loads = [len(one) for one in held], [int(widths[one].sum()) if one else 0 for one in held]
    assert max(counts) - min(counts) <= 1
    assert max(loads) - min(loads) <= widths.max()


@given(WIDTHS, PROCESSES, TOKENS, ITEMS)
def test_a_filler_only_where_there_is_nothing_left_to_split(
    widths: np.ndarray, processes: int, tokens: int | None, items: int | None
) -> None:
    for share in plan(widths, processes, tokens, items):
        if any(batch.weight == 0 for batch in share):
            assert all(len(batch.items) == 1 for batch in share)
            assert all(batch.width == widths.min() for batch in share if batch.weight == 0)


def test_the_process_that_needs_fewer_passes_splits_where_that_spares_most_padding() -> None:
    """Dealt to and fro: 300, 90, 90, 10 take two passes of at most 600; 100, 100, 90, 20 would take one."""
    widths = np.array([300, 100, 100, 90, 90, 90, 20, 10])
    first, second = plan(widths, 2, 600, None)
    assert [batch.items for batch in first] == [(0,), (3, 4, 7)]
    assert [batch.items for batch in second] == [(1, 2, 5), (6,)]
    assert all(batch.weight == 1 for batch in second)


@given(WIDTHS, TOKENS, ITEMS)
def test_neighbours_in_length_share_a_pass_and_no_cut_would_spare_more_than_a_pass_costs(
    widths: np.ndarray, tokens: int | None, items: int | None
) -> None:
    (share,) = plan(widths, 1, tokens, items)
    lengths = [int(widths[i]) for batch in sorted(share, key=lambda b: -b.width) for i in batch.items]
    assert lengths == sorted(lengths, reverse=True)
    for batch in share:
        size, within = len(batch.items), [int(widths[i]) for i in batch.items]
        spared = [(size - at) * (batch.width - within[at]) for at in range(1, size)]
        assert max(spared, default=0) <= PASS_TOKENS


@given(st.lists(st.integers(1, 900), min_size=1, max_size=7), TOKENS, ITEMS)
def test_one_process_cuts_at_the_least_cost_of_all_ways_to_cut(
    found: list[int], tokens: int | None, items: int | None
) -> None:
    """Brute force over every way to cut the sorted list."""
    lengths = sorted(found, reverse=True)
    costs = []
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        ends = [at for at, cut in enumerate(cuts, start=1) if cut]
        runs = [lengths[a:b] for a, b in itertools.pairwise([0, *ends, len(lengths)])]
        fits = all(
            len(run) == 1
            or ((tokens is None or len(run) * run[0] <= tokens) and (items is None or len(run) <= items))
            for run in runs
        )
        if fits:
            costs.append(sum(len(run) * run[0] + PASS_TOKENS for run in runs))
    (share,) = plan(np.array(found), 1, tokens, items)
    assert sum(batch.tokens + PASS_TOKENS for batch in share) == min(costs)


@given(WIDTHS, PROCESSES, TOKENS, st.randoms())
def test_the_order_within_a_step_does_not_matter(
    widths: np.ndarray, processes: int, tokens: int | None, random: object
) -> None:
    shuffled = list(range(len(widths)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = plan_step(np.array(shuffled), widths, processes=processes, max_tokens=tokens)
    assert again == plan(widths, processes, tokens, None)


@given(WIDTHS, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2), PROCESSES, TOKENS)
def test_what_a_step_holds_depends_on_seed_and_epoch_alone(
    widths: np.ndarray, batch_size: int, seed: int, epoch: int, processes: int, tokens: int | None
) -> None:
    one = StepPlan(widths, batch_size, seed)
    other = StepPlan(widths, batch_size, seed, processes, tokens)
    assert len(one) == -(-len(widths) // batch_size)
    for step in range(len(one)):
        held = [i for share in other.micro_batches(epoch, step) for b in share if b.weight for i in b.items]
        assert sorted(held) == sorted(one.items(epoch, step))
    whole = np.concatenate([one.items(epoch, step) for step in range(len(one))])
    assert sorted(whole) == list(range(len(widths)))
    sizes = [len(one.items(epoch, step)) for step in range(len(one))]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len(set(orders)) == 6


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"processes": 0}, {"max_tokens": 0}, {"max_items": -1}])
def test_limits_below_one_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        StepPlan(np.array([3]), **({"batch_size": 1} | wrong))


def test_no_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="items is 0"):
        StepPlan(np.array([], dtype=np.int64), 1)
