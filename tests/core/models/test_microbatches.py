"""Microbatches: every row once, within the budget, also when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import EngineError
from qrpo_core.data.step_plan import ItemSizes
from qrpo_core.models.microbatches import Microbatches, is_out_of_memory

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def cpu_is_full() -> None:
    """What the CPU's allocator raises: more memory than any machine has."""
    torch.empty(1 << 60, dtype=torch.uint8)


def device_is_full() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def machine_is_full() -> None:
    raise MemoryError


@given(lengths=LENGTHS, max_tokens=st.integers(1, 2000))
def test_every_row_comes_once_and_passes_keep_to_the_budget(lengths: list[int], max_tokens: int) -> None:
    seen: list[int] = []
    counted = 0

    def work(rows: list[int]) -> None:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= max_tokens
        seen.extend(rows)

    def progress(rows: int) -> None:
        nonlocal counted
        counted += rows

    Microbatches(max_tokens).run_padded(lengths, work, progress)
    assert sorted(seen) == list(range(len(lengths)))
    assert counted == len(lengths)


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 300)), max_size=60),
    max_tokens=st.integers(1, 2000),
)
def test_packed_rows_share_prompts_and_keep_to_the_budget(
    rows: list[tuple[int, int]], max_tokens: int
) -> None:
    sizes, seen = ItemSizes.of([[([prompt] * 50, [1] * tokens)] for prompt, tokens in rows]), []

    def work(part: list[int]) -> None:
        prompts = len({rows[row][0] for row in part})
        assert len(part) == 1 or 50 * prompts + sum(rows[row][1] for row in part) <= max_tokens
        seen.extend(part)

    Microbatches(max_tokens).run(sizes, work)
    assert sorted(seen) == list(range(len(rows)))


@settings(max_examples=6, deadline=None)  # each shortage collects garbage, of a whole test session
@pytest.mark.parametrize("fail", [cpu_is_full, device_is_full, machine_is_full])
@given(lengths=LENGTHS, memory=st.integers(300, 3000))
def test_the_budget_is_halved_until_it_fits_and_stays_so(
    fail: Callable[[], None], lengths: list[int], memory: int
) -> None:
    microbatches, done, failures = Microbatches(1 << 20), [], 0

    def work(rows: list[int]) -> None:
        nonlocal failures
        if len(rows) * max(lengths[row] for row in rows) > memory:
            failures += 1
            fail()
        done.extend(rows)

    microbatches.run_padded(lengths, work)
    assert sorted(done) == list(range(len(lengths)))
    before = failures
    microbatches.run_padded(lengths, work)
    assert failures == before, "what did not fit was tried again"


def test_a_row_that_does_not_fit_by_itself_is_named() -> None:
    def work(rows: list[int]) -> None:
        if 1 in rows:
            machine_is_full()

    with pytest.raises(EngineError, match="row of 70 tokens") as caught:
        Microbatches(1000).run_padded([5, 70, 9], work)
    assert caught.value.where == "row 1"


def test_other_errors_pass_through() -> None:
    def work(rows: list[int]) -> None:
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="assert"):
        Microbatches(1000).run_padded([5, 70, 9], work)
    assert not is_out_of_memory(ValueError("can't allocate memory"))
