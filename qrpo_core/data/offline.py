"""The completions that a data set brings its prompts, as a table: each once, with one reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from qrpo_core import ids
from qrpo_core.data.completions import Completion
from qrpo_core.data.rows import Row
from qrpo_core.errors import DataError
from qrpo_core.records import OFFLINE, check_table


class OfflineRows:
    """Collects the completions of prompts: pairs or graded completions, each once."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        #: Of every prompt: its pairs, and the place of each.
        self.pairs: dict[str, dict[tuple[str, str], str]] = {}
        #: Of every prompt: its further completions in their order.
        self.graded: dict[str, list[str]] = {}
        #: Of every prompt: its completions, and the reward and the place of each.
        self.rewards: dict[str, dict[str, tuple[float | None, str]]] = {}

    def add(self, prompt: str, row: Row) -> None:
        """Take the completions of one row; DataError for one that came before with another reward."""
        if row.pair is not None:
            for completion in row.pair:
                self._first(prompt, completion, row.source)
            pairs = self.pairs.setdefault(prompt, {})
            texts = (row.pair[0].text, row.pair[1].text)
            self.counts["repeated_pairs"] += texts in pairs
            pairs.setdefault(texts, row.source)
        for completion in row.completions:
            if self._first(prompt, completion, row.source):
                self.graded.setdefault(prompt, []).append(completion.text)
            else:
                self.counts["repeated_completions"] += 1

    def _first(self, prompt: str, completion: Completion, source: str) -> bool:
        """Whether the completion is new to its prompt."""
        known, reward = self.rewards.setdefault(prompt, {}), completion.reward
        before = known.get(completion.text)
        if before is None:
            known[completion.text] = (reward, f"{source}, {completion.place}")
        elif before[0] != reward:
            raise DataError(
                f"the completion of {before[1]} stands in {completion.place} with the reward "
                f"{_grade(reward)}, there with {_grade(before[0])}",
                where=source,
                remedy="keep one of the two, or give both the same reward",
            )
        return before is None

    def table(self) -> pa.Table:
        """Table OFFLINE; DataError where two different texts of one prompt have the same number."""
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


def _numbered(prompt: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Rows of one prompt, (text, ..., source), with prompt and sample_index put before them."""
    holders: dict[int, tuple[Any, ...]] = {}
    for row in rows:
        index = ids.completion_index(row[0])
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
    """A table of rows whose values stand in the order of its columns."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(values, item.type) for values, item in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)
