"""Items stored as columns: the same items, at a few bytes each beside their tokens."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Collator, Example, ExampleColumns, Pair, PairColumns
from qrpo_core.objective import RankCounts, calibrated_targets, get_transform
from qrpo_core.pipeline.training_targets import TrainingData
from qrpo_core.training.survival import rows_to_compare

ROWS, TOKENS = 2_000, 400


def column(rows: int, tokens: int, start: int) -> pa.ChunkedArray:
    """[rows] lists of `tokens` integers, in two chunks."""
    halves = (rows // 2, rows - rows // 2)
    return pa.chunked_array(
        [
            pa.ListArray.from_arrays(
                np.arange(half + 1, dtype=np.int32) * tokens,
                pa.array(np.arange(half * tokens, dtype=np.int32) % 97 + start),
            )
            for half in halves
        ]
    )


def columns(rows: int, tokens: int = 3) -> ExampleColumns:
    numbers = np.random.default_rng(0).random((5, rows))
    return ExampleColumns(column(rows, tokens, 0), column(rows, tokens, 100), *numbers)


def same(one: Example, other: Example) -> bool:
    names = ("target", "beta", "ref_logprob", "reward", "log_partition")
    lists = ("prompt_token_ids", "token_ids")
    return all(getattr(one, name) == getattr(other, name) for name in names) and all(
        list(getattr(one, name)) == list(getattr(other, name)) for name in lists
    )


def test_columns_are_a_sequence_of_examples() -> None:
    stored = columns(5)
    assert len(stored) == len(list(stored)) == 5
    expected = Example(
        stored.prompt_token_ids[4].as_py(),
        stored.token_ids[4].as_py(),
        *(float(values[4]) for values in (stored.target, stored.beta, stored.ref_logprob)),
        *(float(values[4]) for values in (stored.reward, stored.log_partition)),
    )
    assert same(stored[4], expected)
    assert same(stored[-1], expected)
    with pytest.raises(IndexError):
        stored[5]
    pairs = PairColumns(stored, np.array([0, 4]), np.array([1, 2]))
    assert len(pairs) == 2
    assert isinstance(pairs[1], Pair)
    assert same(pairs[1].chosen, expected)
    batch, plain = (Collator()([item]) for item in (pairs[1], Pair(expected, stored[2])))
    assert (batch.pop("packed").input_ids == plain.pop("packed").input_ids).all()
    assert all((batch[name] == plain[name]).all() for name in plain)
    assert [same(*two) for two in zip(rows_to_compare(pairs), [stored[i] for i in (0, 1, 4, 2)], strict=True)]


def test_the_items_of_a_training_set_take_no_memory_for_their_tokens() -> None:
    """A Python list takes 8 bytes a token, and 32 more for its integer; a view of the table takes none."""
    table = pa.table(
        {
            "prompt_token_ids": column(ROWS, TOKENS, 0),
            "token_ids": column(ROWS, TOKENS, 100),
            "ref_logprob": np.zeros(ROWS),
            "reward": np.zeros(ROWS),
        }
    )
    ranks = RankCounts(np.ones(ROWS, int), np.zeros(ROWS, int), np.full(ROWS, 2))
    targets = calibrated_targets(ranks, transform=get_transform("identity"), beta=0.1, normaliser="finite")
    data = TrainingData(table, pa.table({}), targets, ObjectiveConfig(), {})
    tracemalloc.start()
    try:
        tokens = sum(len(item.prompt_token_ids) + len(item.token_ids) for item in data.items())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tokens == 2 * ROWS * TOKENS
    assert peak < 0.1 * tokens
