"""What a reader must know before believing a result: short lines above the report and the summary.

A headline is one plain sentence (or two) that stands under the result's first line wherever that is shown:
the terminal, the UI, the report. They are made from the facts of artifacts, in `qrpo_core.steps.headlines`,
where each part of the pipeline adds its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: warning: the result may not mean what it seems to. note: worth knowing first, nothing is wrong.
Severity = Literal["warning", "note"]

_ORDER: dict[Severity, int] = {"warning": 0, "note": 1}


@dataclass(frozen=True)
class Headline:
    """A line for the top. text : whole sentences, numbers spelled, with the remedy where there is one."""

    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"Warning: {self.text}" if self.severity == "warning" else self.text


def in_order(found: Iterable[Headline]) -> list[Headline]:
    """Warnings first; otherwise as they were found, each once."""
    return sorted(dict.fromkeys(found), key=lambda each: _ORDER[each.severity])
