"""The table of a data set's own completions: each once, with one reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import OFFLINE, check_table
from qrpo_core.data.row_completions import Completion
from qrpo_core.data.rows import Row


class OfflineRows:
    """Collects pairs and graded completions of prompts, each once."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        #: By prompt: its pairs, and the place of each.
        self.pairs: dict[str, dict[tuple[str, str], str]] = {}
        #: By prompt: its other completions, in order.
        self.graded: dict[str, list[str]] = {}
        #: By prompt and completion: the reward and the place.
        self.rewards: dict[str, dict[str, tuple[float | None, str]]] = {}

    def check(self, prompt: str, row: Row) -> None:
        """Raise DataError if the row has a completion that another row, or itself, gives another reward."""
        known, new = self.rewards.get(prompt, {}), dict[str, tuple[float | None, str]]()
        for completion in _completions(row):
            text, reward = completion.text, completion.reward
            before = known.get(text) or new.setdefault(text, (reward, _place(row, completion)))
            if before[0] != reward:
                raise DataError(
                    f"the completion of {before[1]} stands in {completion.place} with the reward "
                    f"{_grade(reward)}, there with {_grade(before[0])}",
                    where=row.source,
                    remedy="keep one of the two, or give both the same reward",
                )

    def add(self, prompt: str, row: Row) -> None:
        """Add the completions of a row that `check` has accepted."""
        for completion in _completions(row):
            known = self.rewards.setdefault(prompt, {})
            repeated = completion.text in known
            known.setdefault(completion.text, (completion.reward, _place(row, completion)))
            if row.pair is None and repeated:
                self.counts["repeated_completions"] += 1
            elif row.pair is None:
                self.graded.setdefault(prompt, []).append(completion.text)
        if row.pair is not None:
            pairs = self.pairs.setdefault(prompt, {})
            texts = (row.pair[0].text, row.pair[1].text)
            self.counts["repeated_pairs"] += texts in pairs
            pairs.setdefault(texts, row.source)

    def table(self) -> pa.Table:
        """Return the table OFFLINE. Raises DataError if two texts of one prompt have the same number."""
        rows: list[tuple[Any, ...]] = []
        for prompt, pairs in self.pairs.items():
            rewards = self.rewards[prompt]
            sides = [
                (text, label, number, rewards[text][0], source)
                for number, (pair, source) in enumerate(pairs.items())
                for text, label in zip(pair, ("chosen", "rejected"), strict=True)
            ]
            rows += _numbered(prompt, sides)
        for prompt, texts in self.graded.items():
            rows += _numbered(prompt, [(text, "", None, *self.rewards[prompt][text]) for text in texts])
        return check_table(from_rows(rows, OFFLINE), OFFLINE, "offline completions")


def _completions(row: Row) -> tuple[Completion, ...]:
    return row.pair or row.completions


def _place(row: Row, completion: Completion) -> str:
    return f"{row.source}, {completion.place}"


def _numbered(prompt: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows (text, ..., source) of a prompt with prompt_id and sample_index before them."""
    holders: dict[int, tuple[Any, ...]] = {}
    for row in rows:
        index = hashing.completion_index(row[0])
        holder = holders.setdefault(index, row)
        if holder[0] != row[0]:
            raise DataError(
                f"two completions of one prompt have the same number {index}; the other is that of "
                f"{holder[-1]}",
                where=row[-1],
                remedy="change one of the two texts by a character, or leave it out",
            )
        yield (prompt, index, *row)


def _grade(reward: float | None) -> str:
    return "null" if reward is None else str(reward)


def from_rows(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Return the table of rows whose values are in the order of its columns."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(values, item.type) for values, item in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)
