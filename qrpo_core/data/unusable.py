"""Rows that a run cannot use: reported all at once, or left out and counted.

The checks of rows (tokenizer, template, lengths, rewards) return an `Unusable` for each problem instead of
raising at the first. `prompts.on_unusable` then decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qrpo_core.common.errors import DataError

OnUnusable = Literal["refuse", "skip"]

#: Kind of a row without the form that the config names.
UNREADABLE = "that cannot be read"

#: Number of problems that a message gives in full; it names the places of the others.
SHOWN = 20
#: Number of further places that a message names; it counts the rest.
PLACES = 1000


@dataclass(frozen=True)
class Unusable:
    """One row that cannot be used.

    prompt_id : the prompt; None for an unreadable row.
    where : file and line, or another name of the row in its data set; else the prompt_id.
    problem : the problem, with the offending value.
    remedy : the remedy for the owner of the data.
    kind : heading under which such problems are counted, such as "too long for the model".
    sample_index : number of the data set's own completion; None for the prompt itself.
    """

    prompt_id: str | None
    where: str
    problem: str
    remedy: str
    kind: str = "other problems"
    sample_index: int | None = None


class UnusableError(DataError):
    """Rows that cannot be used. The first line of its text counts them; then each row has a line.

    found : the rows; empty if the error came from another process.
    """

    found: tuple[Unusable, ...] = ()

    @classmethod
    def of(cls, lines: Sequence[str], found: Sequence[Unusable]) -> UnusableError:
        """Return the error of these rows with these lines as its text."""
        error = cls("\n".join(lines))
        error.found = tuple(found)
        return error

    def __str__(self) -> str:
        return self.message


def report_unusable(found: Sequence[Unusable], on_unusable: OnUnusable) -> set[str]:
    """Raise one UnusableError for all of `found`, or with "skip" return the prompts to leave out.

    A problem of a single completion (`sample_index`) does not leave out its prompt.
    """
    if found and on_unusable == "refuse":
        raise UnusableError.of(unusable_lines(found), found)
    return {each.prompt_id for each in found if each.prompt_id is not None and each.sample_index is None}


def unusable_lines(found: Sequence[Unusable]) -> list[str]:
    """Return the message: counts by kind, the remedy, the first `SHOWN` problems, places of the others."""
    rows = len({(each.prompt_id, each.where, each.sample_index) for each in found})
    by_kind = ", ".join(f"{count} {kind}" for kind, count in count_kinds(found).items())
    remedy = "correct or remove them, or set prompts.on_unusable: skip to leave them out and count them"
    lines = [f"{rows} row{'s' if rows > 1 else ''} cannot be used ({by_kind}): {remedy}"]
    lines += ["  " + _one_line(f"{each.where}: {each.problem}; {each.remedy}") for each in found[:SHOWN]]
    rest = [each.where for each in found[SHOWN:]]
    if rest:
        more = f" and {len(rest) - PLACES} more" if len(rest) > PLACES else ""
        lines.append(f"  further: {', '.join(rest[:PLACES])}{more}")
    return lines


def count_kinds(found: Iterable[Unusable]) -> dict[str, int]:
    """Return the number of problems of each kind, the most frequent first."""
    return dict(Counter(each.kind for each in found).most_common())


def _one_line(text: str) -> str:
    return " ".join(text.split())
