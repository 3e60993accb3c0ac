"""Shapes follow from a row's own length; every row is dealt to exactly one table."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.engines.base import SampleRequest
from qrpo_core.engines.batching import (
    decode_batches,
    positions_for,
    prefill_groups,
    slots_by_memory,
    slots_for,
    visible_for,
)

LENGTHS = st.lists(st.integers(1, 3000), max_size=40)


def requests_of(lengths: list[int]) -> list[SampleRequest]:
    return [SampleRequest(f"p{row}", 0, (row % 3,) * length, row) for row, length in enumerate(lengths)]


@given(length=st.integers(1, 200_000))
def test_positions_hold_the_row_and_at_most_half_more(length: int) -> None:
    positions = positions_for(length)
    assert length <= positions <= max(96, 1.5 * length)
    assert positions % 32 == 0
    assert positions_for(positions) == positions


@given(length=st.integers(1, 200_000))
def test_slots_shrink_with_length_and_bound_the_memory(length: int) -> None:
    positions = positions_for(length)
    slots = slots_for(positions)
    assert slots % 8 == 0
    assert 8 <= slots <= 64
    assert slots * positions <= 32768 or slots == 8
    assert slots >= slots_for(2 * positions)


@given(lengths=LENGTHS, limit=st.integers(1, 100))
def test_a_row_is_dealt_once_and_its_shape_is_its_own(lengths: list[int], limit: int) -> None:
    dealt = decode_batches(requests_of(lengths), limit)
    assert sorted(row for table in dealt for row in table.rows) == list(range(len(lengths)))
    for table in dealt:
        for row in table.rows:
            assert table.positions == positions_for(lengths[row] + limit)
            assert table.slots == slots_for(table.positions)


@given(lengths=LENGTHS.filter(bool), slots=st.integers(1, 64))
def test_given_slots_put_all_rows_into_one_table(lengths: list[int], slots: int) -> None:
    (table,) = decode_batches(requests_of(lengths), 5, slots=slots)
    assert (table.slots, table.positions) == (slots, positions_for(max(lengths) + 5))
    assert sorted(table.rows) == list(range(len(lengths)))


@given(copies=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.randoms())
def test_equal_prompts_are_neighbours(copies: list[int], seed: object) -> None:
    asked = [SampleRequest("p", i, (kind, 1), i) for kind, count in enumerate(copies) for i in range(count)]
    seed.shuffle(asked)  # type: ignore[attr-defined]
    (table,) = decode_batches(asked, 5)
    prompts = [asked[row].prompt_token_ids for row in table.rows]
    changes = sum(a != b for a, b in pairwise(prompts))
    assert changes == len(copies) - 1


def test_slots_by_memory_of_two_models() -> None:
    """By hand, 1,024 positions. SmolLM2-135M, bfloat16: 30 layers * 3 heads * 64 * 2 * 2 = 23,040 bytes a
    position and 49,152 tokens * 64 bytes: 26,738,688 bytes a slot; 10 GB hold 373.99 of them. Llama 3.1 8B:
    32 * 8 * 128 * 2 * 2 = 131,072 bytes and 128,256 tokens: 142,426,112 bytes; 30 GB hold 210.6."""
    assert slots_by_memory(20_000_000_000, 23_040, 1024, 49_152) == 368
    assert slots_by_memory(60_000_000_000, 131_072, 1024, 128_256) == 208
    assert slots_by_memory(1, 131_072, 1024, 128_256) == 8
    assert slots_by_memory(10**15, 23_040, 96, 49_152) == 1024


@given(length=st.integers(1, 5000), more=st.integers(0, 5000))
def test_visible_positions_hold_the_longest_row_and_there_are_few(length: int, more: int) -> None:
    visible = visible_for(length, length + more)
    assert length <= visible <= max(256, 2 * length)
    assert visible == length + more or visible in (256, 512, 1024, 2048, 4096, 8192)


@given(lengths=st.lists(st.integers(1, 300), max_size=40), tokens=st.one_of(st.none(), st.integers(1, 2000)))
def test_prompts_are_prefilled_in_order_within_the_tokens_of_a_pass(
    lengths: list[int], tokens: int | None
) -> None:
    prompts = [(at, *[0] * (length - 1)) for at, length in enumerate(lengths)]
    groups = list(prefill_groups(prompts, tokens))
    assert [prompt for group in groups for prompt in group] == prompts
    for group, following in pairwise([*groups, ()]):
        room = tokens or 0
        assert len(group) == 1 or len(group) * max(map(len, group)) <= room
        joined = [*group, *following[:1]]
        assert not following or len(joined) * max(map(len, joined)) > room
