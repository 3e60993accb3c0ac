"""Headlines: warnings and notes that stand under the first line of a result.

The terminal, the UI and the report show them. `pipeline.run_headlines` makes them from the facts of
artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: warning: the result may mislead. note: a fact to know first; nothing is wrong.
Severity = Literal["warning", "note"]

_ORDER: dict[Severity, int] = {"warning": 0, "note": 1}


@dataclass(frozen=True)
class Headline:
    """A warning or note. text : whole sentences, with the remedy if there is one."""

    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"Warning: {self.text}" if self.severity == "warning" else self.text


def sort_headlines(found: Iterable[Headline]) -> list[Headline]:
    """The headlines, each once: warnings first, otherwise in the given order."""
    return sorted(dict.fromkeys(found), key=lambda each: _ORDER[each.severity])
