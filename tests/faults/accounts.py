"""What runs bought, and whether what they left in the store is right.

Nothing here asks the code under test what is committed: the journal says what was bought, the objects of the
store are read as they lie there.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

#: (step, row key, sample_index).
Row = tuple[str, str, int]

#: A batch of another shape moves the last digits of these.
_INEXACT = {("logprob", "logprob"), ("training_set", "ref_logprob")}
TOLERANCE = 1e-5


class Journal:
    """The events of all runs on one store, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, did: str, **facts: Any) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, (json.dumps({"run": 0, "did": did, **facts}) + "\n").encode())
        os.close(handle)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            yield from map(json.loads, self.path.read_text().splitlines())

    def count(self, did: str) -> int:
        return sum(event["did"] == did for event in self)

    def bought(self, step: str = "") -> int:
        """Rows begun so far, of one step or all."""
        events = (event for event in self if event["did"] == "begin" and event["step"].startswith(step))
        return sum(len(event["rows"]) for event in events)


@dataclass
class Account:
    """Rows bought on one store.

    bought : rows whose computation was begun. A block counts whole, however far it came.
    twice : of them, rows begun before. in_flight : of those, rows that nobody had committed by then.
    destroyed : of those, rows that the fault itself had taken out of the store.
    committed : rows that were in the store at some time and not destroyed later.
    """

    bought: int = 0
    twice: int = 0
    in_flight: int = 0
    destroyed: int = 0
    committed: set[Row] = field(default_factory=set)


def account(journal: Journal) -> Account:
    """Read a journal."""
    found = Account()
    begun: Counter[Row] = Counter()
    gone: set[Row] = set()
    for event in journal:
        rows = [(event["step"], key, index) for key, index in event.get("rows", ())]
        if event["did"] == "begin":
            found.bought += len(rows)
            for row in rows:
                if begun[row]:
                    found.twice += 1
                    found.destroyed += row in gone
                    found.in_flight += row not in gone and row not in found.committed
                begun[row] += 1
        elif event["did"] in ("commit", "found"):
            found.committed.update(rows)
            gone.difference_update(rows)
        elif event["did"] == "destroyed":
            found.committed.difference_update(rows)
            gone.update(rows)
    return found


def blocks_in(objects: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(step, index key, manifest) of every readable block, without touching anything."""
    for key in objects.keys("blocks/"):
        if "/index/" in key:
            try:
                manifest = json.loads(objects.read(key))
                assert manifest["file"]
            except (ValueError, KeyError, TypeError):
                continue
            yield key.split("/")[1], key, manifest


def rows_of(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """(row key, sample_index) of a block's rows."""
    return [(key, first + i) for key, first, count in manifest["runs"] for i in range(count)]


def contents(objects: Any) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every row of every committed block, copies included."""
    for step, _, manifest in blocks_in(objects):
        table = pq.read_table(io.BytesIO(objects.read(manifest["file"]))).to_pylist()
        for (key, index), row in zip(rows_of(manifest), table, strict=True):
            yield (step, key, index), row


def same(step: str, row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two rows are equal; log-probs of the transformers engine to `TOLERANCE`, relative."""
    return row.keys() == expected.keys() and all(
        math.isclose(value, expected[name], rel_tol=TOLERANCE)
        if (step, name) in _INEXACT
        else value == expected[name]
        for name, value in row.items()
    )


@dataclass
class Outcome:
    """A fault, how often it was injected, and what it cost.

    lost : rows that were committed and are not in the store any more, those excepted that the fault destroyed
        and that were bought again.
    twice, in_flight, destroyed : as in `Account`. wrong : rows that are not those of an undisturbed run, in
        any block or in the training set.
    """

    fault: str
    back_end: str
    injected: int
    bought: int = 0
    lost: int = 0
    twice: int = 0
    in_flight: int = 0
    destroyed: int = 0
    wrong: int = 0
    detail: str = ""

    def add(self, other: Outcome) -> Outcome:
        """Both together."""
        sums = {
            name: value + getattr(other, name)
            for name, value in asdict(self).items()
            if isinstance(value, int)
        }
        return Outcome(**{**asdict(self), **sums})

    def check(self) -> Outcome:
        """AssertionError unless nothing was lost, nothing wrong, and nothing bought again without a reason."""
        assert self.injected > 0, self
        assert self.lost == self.wrong == 0, self
        assert self.twice == self.in_flight + self.destroyed, self
        return self


def total(outcomes: Iterable[Outcome]) -> Outcome:
    """All together; the first one names them."""
    first, *rest = outcomes
    for each in rest:
        first = first.add(each)
    return first
