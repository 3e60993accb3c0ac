"""Shapes follow from a row's own length; every row is dealt to exactly one table."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.engines.base import SampleRequest
from qrpo_core.engines.batching import positions_for, slots_for, tables

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
    dealt = tables(requests_of(lengths), limit)
    assert sorted(row for table in dealt for row in table.rows) == list(range(len(lengths)))
    for table in dealt:
        for row in table.rows:
            assert table.positions == positions_for(lengths[row] + limit)
            assert table.slots == slots_for(table.positions)


@given(lengths=LENGTHS.filter(bool), slots=st.integers(1, 64))
def test_given_slots_put_all_rows_into_one_table(lengths: list[int], slots: int) -> None:
    (table,) = tables(requests_of(lengths), 5, slots=slots)
    assert (table.slots, table.positions) == (slots, positions_for(max(lengths) + 5))
    assert sorted(table.rows) == list(range(len(lengths)))


@given(copies=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.randoms())
def test_equal_prompts_are_neighbours(copies: list[int], seed: object) -> None:
    asked = [SampleRequest("p", i, (kind, 1), i) for kind, count in enumerate(copies) for i in range(count)]
    seed.shuffle(asked)  # type: ignore[attr-defined]
    (table,) = tables(asked, 5)
    prompts = [asked[row].prompt_token_ids for row in table.rows]
    changes = sum(a != b for a, b in pairwise(prompts))
    assert changes == len(copies) - 1
