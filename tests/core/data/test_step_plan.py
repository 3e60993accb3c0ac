"""The laws of a plan: what a step holds, and how it is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError
from qrpo_core.data.step_plan import ItemSizes, MicroBatch, StepPlan, epoch_order, plan_step


@st.composite
def item_sizes(draw: st.DrawFn) -> ItemSizes:
    """Up to 40 items of up to six prompts."""
    lengths = draw(st.lists(st.integers(1, 500), min_size=1, max_size=6))
    prompts = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=40))
    completions = [draw(st.integers(1, 400)) for _ in prompts]
    return ItemSizes(np.array(prompts), np.array(lengths)[prompts], np.array(completions))


SIZES = item_sizes()
PROCESSES = st.integers(1, 5)
TOKENS = st.none() | st.integers(1, 4000)
ITEMS = st.none() | st.integers(1, 9)


def plan(
    sizes: ItemSizes, processes: int = 1, tokens: int | None = None, items: int | None = None
) -> list[list[MicroBatch]]:
    return plan_step(np.arange(len(sizes)), sizes, processes=processes, max_tokens=tokens, max_items=items)


def alone(lengths: Sequence[int]) -> ItemSizes:
    """Items that share nothing: prompts of one token."""
    ones = np.ones(len(lengths), dtype=np.int64)
    return ItemSizes(np.arange(len(lengths)), ones, np.array(lengths) - 1)


def row_tokens(sizes: ItemSizes, items: Iterable[int]) -> int:
    """Tokens of a microbatch, counted prompt by prompt."""
    prompts = {(int(sizes.prompts[i]), int(sizes.prompt_tokens[i])) for i in items}
    return sum(tokens for _, tokens in prompts) + sum(int(sizes.completion_tokens[i]) for i in items)


@given(SIZES, PROCESSES, TOKENS, ITEMS)
def test_every_item_counts_exactly_once_and_budgets_hold(
    sizes: ItemSizes, processes: int, tokens: int | None, items: int | None
) -> None:
    shares = plan(sizes, processes, tokens, items)
    assert len(shares) == processes
    assert len({len(share) for share in shares}) == 1, "every process gets the same number of passes"
    counted = Counter(item for share in shares for batch in share for item in batch.items if batch.weight)
    assert counted == Counter(range(len(sizes)))
    for batch in chain(*shares):
        assert batch.tokens == row_tokens(sizes, batch.items)
        assert items is None or len(batch.items) <= items
        assert tokens is None or batch.tokens <= tokens or len(batch.items) == 1
        assert batch.weight or len(batch.items) == 1


@given(SIZES, PROCESSES)
def test_loads_differ_by_the_longest_group_which_is_an_equal_share_at_most(
    sizes: ItemSizes, processes: int
) -> None:
    loads = [
        sum(batch.tokens for batch in share if batch.weight) for share in plan(sizes, processes, None, None)
    ]
    share = -(-row_tokens(sizes, range(len(sizes))) // processes)
    longest = max(row_tokens(sizes, [item]) for item in range(len(sizes)))
    assert max(loads) - min(loads) <= max(share, longest)


@given(SIZES, PROCESSES, TOKENS, ITEMS)
def test_a_filler_only_where_there_is_nothing_left_to_split(
    sizes: ItemSizes, processes: int, tokens: int | None, items: int | None
) -> None:
    shortest = min(row_tokens(sizes, [item]) for item in range(len(sizes)))
    for share in plan(sizes, processes, tokens, items):
        if any(batch.weight == 0 for batch in share):
            assert all(len(batch.items) == 1 for batch in share)
            assert all(batch.tokens == shortest for batch in share if batch.weight == 0)


@given(st.lists(st.integers(2, 900), min_size=1, max_size=7), st.integers(900, 2000))
@example([63, 64, 126, 189, 736, 863], 1051)
def test_few_items_take_as_few_passes_as_any_way_to_pack_them(lengths: list[int], tokens: int) -> None:
    """Brute force over every way to give 7 items to at most 7 passes.

    First fit, longest first, takes at most 11/9 of the fewest and 6/9 more (Dosa 2007): 1 for 1, 3 for 2.
    """

    def fits(passes: int) -> bool:
        ways = product(range(passes), repeat=len(lengths))
        return any(
            all(
                sum(n for n, at in zip(lengths, way, strict=True) if at == one) <= tokens
                for one in range(passes)
            )
            for way in ways
        )

    fewest = next(passes for passes in range(1, 8) if fits(passes))
    (share,) = plan(alone(lengths), 1, tokens)
    assert fewest <= len(share) <= (11 * fewest + 6) // 9


def test_sixteen_pairs_of_64_to_1000_tokens_are_one_pass_of_16384_tokens() -> None:
    """Rows of 490 tokens in the mean, whose two sides share their prompts."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(32, 260, 16)
    sides = draw.integers(32, 660, (16, 2))
    sizes = ItemSizes(np.arange(16), prompts, sides.sum(1))
    assert 450 < (2 * prompts.sum() + sides.sum()) / 32 < 530
    (share,) = plan(sizes, 1, 16384)
    assert len(share) == 1
    for processes in (2, 4, 8):
        assert {len(part) for part in plan(sizes, processes, 16384)} == {1}


def test_four_completions_behind_a_prompt_of_equal_length_are_1_6_times_fewer_tokens() -> None:
    rows = [[([1] * 100, [row] * 100)] for row in range(4)]
    assert ItemSizes.of(rows).tokens(range(4)) == 500 == 800 / 1.6


def test_sizes_of_items() -> None:
    pair = [([1, 2], [3]), ([1, 2], [3, 4])]
    two_prompts = [([1, 2], [3]), ([1], [5])]
    sizes = ItemSizes.of([pair, [([1, 2], [9])], two_prompts, two_prompts, [([2, 1], [9])]])
    assert sizes.prompts.tolist() == [0, 0, 1, 2, 3]
    assert sizes.prompt_tokens.tolist() == [2, 2, 3, 3, 2]
    assert sizes.completion_tokens.tolist() == [3, 1, 2, 2, 1]
    assert len(ItemSizes.of([])) == 0


def test_items_of_one_prompt_stay_together_and_are_cut_where_they_do_not_fit() -> None:
    sizes = ItemSizes(np.array([0, 1, 0, 1, 0]), np.array([10, 10, 10, 10, 10]), np.array([5, 5, 5, 5, 5]))
    (share,) = plan(sizes, 1, 25)
    assert [batch.items for batch in share] == [(0, 2, 4), (1, 3)]
    (share,) = plan(sizes, 1, 20)
    assert [(batch.items, batch.tokens) for batch in share] == [((0, 2), 20), ((1, 3), 20), ((4,), 15)]
    two = plan(sizes, 2)
    assert [[batch.items for batch in part] for part in two] == [[(0, 2, 4)], [(1, 3)]]


def test_passes_are_even_where_that_costs_none() -> None:
    (share,) = plan(alone([400, 300, 200, 100, 100, 100]), 1, 1000)
    assert [batch.tokens for batch in share] == [600, 600]


@given(SIZES, PROCESSES, TOKENS, st.randoms())
def test_the_order_within_a_step_does_not_matter(
    sizes: ItemSizes, processes: int, tokens: int | None, random: object
) -> None:
    shuffled = list(range(len(sizes)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = plan_step(np.array(shuffled), sizes, processes=processes, max_tokens=tokens)
    assert again == plan(sizes, processes, tokens)


@given(SIZES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2), PROCESSES, TOKENS)
def test_what_a_step_holds_depends_on_seed_and_epoch_alone(
    sizes: ItemSizes, batch_size: int, seed: int, epoch: int, processes: int, tokens: int | None
) -> None:
    one = StepPlan(sizes, batch_size, seed)
    other = StepPlan(sizes, batch_size, seed, processes, tokens)
    assert len(one) == -(-len(sizes) // batch_size)
    for step in range(len(one)):
        held = [i for share in other.micro_batches(epoch, step) for b in share if b.weight for i in b.items]
        assert sorted(held) == sorted(one.items(epoch, step))
    whole = np.concatenate([one.items(epoch, step) for step in range(len(one))])
    assert sorted(whole) == list(range(len(sizes)))
    sizes = [len(one.items(epoch, step)) for step in range(len(one))]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(alone([1] * 50), seed, epoch)) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len(set(orders)) == 6


@given(SIZES, st.integers(0, 3), st.integers(0, 2))
def test_a_prompts_items_come_in_twos(sizes: ItemSizes, seed: int, epoch: int) -> None:
    order = epoch_order(sizes, seed, epoch)
    assert sorted(order) == list(range(len(sizes)))
    runs = [(number, len(list(run))) for number, run in groupby(sizes.prompts[order].tolist())]
    for number, count in Counter(sizes.prompts.tolist()).items():
        assert sum(length // 2 for each, length in runs if each == number) == count // 2


def test_the_places_of_a_prompt_are_random() -> None:
    """Among many seeds each of ten prompts of two items, and of ten of one, comes first about as often."""
    sizes = ItemSizes.of([[((prompt,), (1,))] for prompt in [*range(10), *range(20)]])
    first = np.bincount([sizes.prompts[epoch_order(sizes, seed, 0)[0]] for seed in range(4000)], minlength=20)
    assert first.sum() == 4000
    assert np.all(np.abs(first - 200) < 5 * np.sqrt(200))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(alone([1] * 8), 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"processes": 0}, {"max_tokens": 0}, {"max_items": -1}])
def test_limits_below_one_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        StepPlan(alone([3]), **({"batch_size": 1} | wrong))


def test_no_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="items is 0"):
        StepPlan(ItemSizes.of([]), 1)
