"""Passes: every row once, within the budget, whatever memory does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.engines.passes import Passes, out_of_memory
from qrpo_core.errors import EngineError

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

    Passes(max_tokens).run(lengths, work, progress)
    assert sorted(seen) == list(range(len(lengths)))
    assert counted == len(lengths)


@settings(max_examples=6, deadline=None)  # each shortage collects garbage, of a whole test session
@pytest.mark.parametrize("fail", [cpu_is_full, device_is_full, machine_is_full])
@given(lengths=LENGTHS, memory=st.integers(300, 3000))
def test_the_budget_is_halved_until_it_fits_and_stays_so(
    fail: Callable[[], None], lengths: list[int], memory: int
) -> None:
    passes, done, failures = Passes(1 << 20), [], 0

    def work(rows: list[int]) -> None:
        nonlocal failures
        if len(rows) * max(lengths[row] for row in rows) > memory:
            failures += 1
            fail()
        done.extend(rows)

    passes.run(lengths, work)
    assert sorted(done) == list(range(len(lengths)))
    before = failures
    passes.run(lengths, work)
    assert failures == before, "what did not fit was tried again"


def test_a_row_that_does_not_fit_by_itself_is_named() -> None:
    def work(rows: list[int]) -> None:
        if 1 in rows:
            machine_is_full()

    with pytest.raises(EngineError, match="row of 70 tokens") as caught:
        Passes(1000).run([5, 70, 9], work)
    assert caught.value.where == "row 1"


def test_other_errors_pass_through() -> None:
    def work(rows: list[int]) -> None:
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="assert"):
        Passes(1000).run([5, 70, 9], work)
    assert not out_of_memory(ValueError("can't allocate memory"))
