"""What runs bought, and whether what they left in the store is right.

Nothing here asks the code under test what is committed: the journal says what was bought, the objects of the
store are read as they lie there.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qrpo_core.common.errors import MissingError
from qrpo_core.common.hashing import digest_bytes

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
        """The events, each with the place in the file where it stands."""
        place = 0
        for line in self.path.read_bytes().splitlines(True) if self.path.exists() else ():
            yield {"at": place, **json.loads(line)}
            place += len(line)

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
    twice : of them, rows begun before. in_flight : of those, rows that nobody had committed when the store
        was asked for them: another run was computing them, or one had died over them.
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
    begun: set[Row] = set()
    committed: dict[Row, int] = {}  # and where that was written down
    gone: set[Row] = set()
    for event in journal:
        rows = [(event["step"], key, index) for key, index in event.get("rows", ())]
        if event["did"] == "begin":
            again = begun.intersection(rows)
            found.bought += len(rows)
            found.twice += len(again)
            found.destroyed += len(again & gone)
            unknown = [row for row in again - gone if committed.get(row, math.inf) >= event["looked"]]
            found.in_flight += len(unknown)
            begun.update(rows)
        elif event["did"] in ("commit", "found"):
            for row in rows:
                committed.setdefault(row, event["at"])
            gone.difference_update(rows)
        elif event["did"] == "destroyed":
            for row in rows:
                committed.pop(row, None)
            gone.update(rows)
    found.committed = set(committed)
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


def whole(objects: Any, manifest: dict[str, Any]) -> bool:
    """Whether a block's data is what its manifest says."""
    try:
        return digest_bytes(objects.read(manifest["file"])) == str(manifest["digest"])
    except MissingError:
        return False


def rows_of(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """(row key, sample_index) of a block's rows."""
    return [(key, first + i) for key, first, count in manifest["ranges"] for i in range(count)]


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

    lost : rows that were committed and are not in the store any more.
    twice, in_flight, destroyed : as in `Account`. wrong : rows that are not those of an undisturbed run, in
        any block or in the training set; and those of blocks that were seen in part.
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
        """AssertionError unless nothing is lost, nothing wrong, and nothing bought again without a reason."""
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
