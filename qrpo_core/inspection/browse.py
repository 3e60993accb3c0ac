"""`qrpo browse`: completions chosen by source, status, reward, quantile and text, to read in a terminal."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from qrpo_core.common.errors import QRPOError
from qrpo_core.common.formatting import decimals_for
from qrpo_core.inspection.completion_groups import benchmark_groups, held_out_groups, training_groups
from qrpo_core.inspection.completion_rows import StoredRows
from qrpo_core.inspection.explain.text import one_line
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace

Row = dict[str, Any]
Order = Literal["stored", "lowest", "highest", "longest"]

#: Characters of a conversation's last turn, and of a completion unless all of it is asked for.
_PROMPT, _TEXT = 160, 400

#: The columns that are read for a row.
_COLUMNS = (
    "source",
    "prompt_id",
    "split",
    "messages",
    "ground_truth",
    "sample_index",
    "text",
    "finish_reason",
    "num_tokens",
    "reward",
    "status",
    "detail",
    "quantile",
)


@dataclass(frozen=True)
class Span:
    """A closed interval of numbers, as written MIN:MAX, MIN:, :MAX or VALUE."""

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def parse(cls, text: str | None, where: str) -> Span | None:
        """The span of an option; None without one. QRPOError if it is no span."""
        if text is None:
            return None
        low, colon, high = text.partition(":")
        try:
            found = (
                cls(float(low or "-inf"), float(high or "inf")) if colon else cls(float(text), float(text))
            )
        except ValueError:
            found = cls(math.nan)
        if not found.low <= found.high:
            raise QRPOError(f"{text!r} is no span", where=where, remedy="write MIN:MAX, MIN:, :MAX or VALUE")
        return found

    def __contains__(self, value: float | None) -> bool:
        return value is not None and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """Which completions are shown; None for any.

    status : a status, or "unscored". search : a text in the completion or its conversation, in any case.
    """

    source: str | None = None
    status: str | None = None
    reward: Span | None = None
    quantile: Span | None = None
    search: str | None = None

    def takes(self, row: Row) -> bool:
        """Whether a row is chosen."""
        if self.status is not None and (row["status"] or "unscored") != self.status:
            return False
        if self.reward is not None and row["reward"] not in self.reward:
            return False
        if self.quantile is not None and row["quantile"] not in self.quantile:
            return False
        if self.search is None:
            return True
        texts = (row["text"], *(turn["content"] for turn in row["messages"]))
        return any(self.search.lower() in text.lower() for text in texts)


@dataclass(frozen=True)
class Found:
    """The rows to show, and how many there are: chosen ones, and all of the chosen source."""

    rows: list[Row]
    chosen: int
    stored: int
    sources: tuple[str, ...]


def browse(workspace: Workspace, choice: Choice, *, order: Order = "stored", limit: int = 20) -> Found:
    """The first `limit` chosen completions in an order: stored, or by reward or length in tokens.

    Raises QRPOError for an unknown source, MissingError where the store has no prompts yet.
    """
    steps = stored_steps(workspace)
    groups = [*training_groups(steps), *held_out_groups(steps), *benchmark_groups(steps)]
    names = tuple(dict.fromkeys(group.name for group in groups))
    if choice.source is not None and choice.source not in names:
        raise QRPOError(
            f"no completions come from {choice.source!r}",
            where="--source",
            remedy=f"one of {', '.join(map(repr, names))}",
        )
    asked = [group for group in groups if choice.source in (None, group.name)]
    counted = _Counted(chain.from_iterable(StoredRows(group).chunks() for group in asked), choice)
    return Found(_first(counted, order, limit), counted.chosen, counted.stored, names)


class _Counted:
    """The chosen rows of tables, counted while they are read."""

    def __init__(self, tables: Iterable[Any], choice: Choice) -> None:
        self.tables, self.choice = tables, choice
        self.stored = self.chosen = 0

    def __iter__(self) -> Iterator[Row]:
        for table in self.tables:
            self.stored += len(table)
            for row in table.select(list(_COLUMNS)).to_pylist():
                if self.choice.takes(row):
                    self.chosen += 1
                    yield row


def _first(rows: Iterable[Row], order: Order, limit: int) -> list[Row]:
    if order == "stored":
        kept: list[Row] = []
        for row in rows:  # all of them, since they are counted
            if len(kept) < limit:
                kept.append(row)
        return kept
    by = "num_tokens" if order == "longest" else "reward"
    sign = 1 if order == "lowest" else -1

    def key(row: Row) -> float:
        return math.inf if row[by] is None else sign * row[by]

    return heapq.nsmallest(limit, rows, key=key)


def browse_lines(found: Found, *, full: bool, experiment: str) -> Iterator[str]:
    """The rows as text. full : whole completions. experiment : its file, for the command named last."""
    for row in found.rows:
        yield f"{_name(row)}  {', '.join(_facts(row))}"
        turn = row["messages"][-1]
        yield f"  {turn['role']}: {_shown(turn['content'], None if full else _PROMPT)}"
        yield f"  → {_shown(row['text'], None if full else _TEXT)}"
        yield ""
    yield (
        f"{len(found.rows):,} shown of {found.chosen:,} that fit, of {found.stored:,} completions "
        f"({'; '.join(found.sources)})."
    )
    if found.rows:
        name = _name(found.rows[0])
        yield f"Where a number comes from: qrpo explain {experiment} {name}"


def _name(row: Row) -> str:
    return f"{row['prompt_id'][:8]}:{row['sample_index']}"


def _facts(row: Row) -> Iterator[str]:
    yield row["source"]
    if row["reward"] is not None:
        yield f"reward {row['reward']:.{decimals_for(row['reward'], None)}f}"
    elif row["status"] is None:
        yield "unscored"
    else:
        yield f"{row['status']}" + (f" ({_shown(row['detail'], _PROMPT)})" if row["detail"] else "")
    if row["quantile"] is not None:
        yield f"quantile {row['quantile']:.3f}"
    if row["num_tokens"] is not None:
        yield f"{row['num_tokens']:,} tokens" + (", cut" if row["finish_reason"] == "length" else "")


def _shown(text: str, most: int | None) -> str:
    """Text whose control characters cannot steer the terminal: one line, or all of it, indented."""
    if most is not None:
        return one_line(text, most)
    return "\n    ".join(one_line(line) for line in text.splitlines())
