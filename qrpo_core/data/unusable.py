"""Rows that a run cannot use: all of them told at once, or left out and counted.

Whoever checks rows (tokenizer, template, lengths, graders) gives one `Unusable` a problem instead of raising
at the first. What happens then is decided here, by `prompts.on_unusable`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qrpo_core.errors import DataError

OnUnusable = Literal["refuse", "skip"]

#: Kind of a row that does not have the form that the config names.
UNREADABLE = "that cannot be read"

#: Problems that a message tells in full; of the others it tells the place.
SHOWN = 20
#: Places that a message names beside those; beyond them it gives their number.
PLACES = 1000


@dataclass(frozen=True)
class Unusable:
    """One row that cannot be used.

    prompt_id : the prompt; None for a row that could not even be read.
    where : file and line, or what else the data set calls the row; the prompt_id where there is none.
    problem : what is wrong, with the offending value. remedy : what its owner can do.
    kind : what such problems are called when they are counted, such as "too long for the model".
    sample_index : which of the data set's own completions is meant; None for the prompt itself.
    """

    prompt_id: str | None
    where: str
    problem: str
    remedy: str
    kind: str = "other problems"
    sample_index: int | None = None


class UnusableError(DataError):
    """Rows that cannot be used. Its text has one line a row, under one that counts them.

    found : the rows; none where it came from another process.
    """

    found: tuple[Unusable, ...] = ()

    @classmethod
    def of(cls, lines: Sequence[str], found: Sequence[Unusable]) -> UnusableError:
        """The error of these rows. lines : its text."""
        error = cls("\n".join(lines))
        error.found = tuple(found)
        return error

    def __str__(self) -> str:
        return self.message


def report_unusable(found: Sequence[Unusable], on_unusable: OnUnusable) -> set[str]:
    """Raise one UnusableError that tells all of `found`, or with "skip" return the prompts to leave out.

    A problem of a single completion (`sample_index`) leaves out no prompt.
    """
    if found and on_unusable == "refuse":
        raise UnusableError.of(unusable_lines(found), found)
    return {each.prompt_id for each in found if each.prompt_id is not None and each.sample_index is None}


def unusable_lines(found: Sequence[Unusable]) -> list[str]:
    """The message: how many of which kind, the remedy, the first `SHOWN` in full, places of the others."""
    rows = len({(each.prompt_id, each.where, each.sample_index) for each in found})
    by_kind = ", ".join(f"{count} {kind}" for kind, count in count_kinds(found).items())
    remedy = "mend or remove them, or set prompts.on_unusable: skip to leave them out, counted"
    lines = [f"{rows} row{'s' if rows > 1 else ''} cannot be used ({by_kind}): {remedy}"]
    lines += ["  " + _one_line(f"{each.where}: {each.problem}; {each.remedy}") for each in found[:SHOWN]]
    rest = [each.where for each in found[SHOWN:]]
    if rest:
        more = f" and {len(rest) - PLACES} more" if len(rest) > PLACES else ""
        lines.append(f"  further: {', '.join(rest[:PLACES])}{more}")
    return lines


def count_kinds(found: Iterable[Unusable]) -> dict[str, int]:
    """How many problems of each kind, the commonest first."""
    return dict(Counter(each.kind for each in found).most_common())


def _one_line(text: str) -> str:
    return " ".join(text.split())
