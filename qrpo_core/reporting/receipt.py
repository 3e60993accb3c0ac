"""The receipt of a run: what it paid, what it reused, and what all of it would have cost anew.

A reused row or artifact is worth what it took when it was computed. Every figure is rounded first, and the
sums are those of the rounded figures, so that the receipt adds up as it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from qrpo_core.reporting.text_table import table

_SECONDS, _HOURS, _COST = Decimal("0.1"), Decimal("0.0001"), Decimal("0.0001")


@dataclass(frozen=True)
class Line:
    """A part of a receipt. count : rows and artifacts. cost : None without a price."""

    what: str
    count: int
    seconds: Decimal
    gpu_hours: Decimal
    cost: Decimal | None

    def __add__(self, other: Line) -> Line:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Line(
            "all anew",
            self.count + other.count,
            self.seconds + other.seconds,
            self.gpu_hours + other.gpu_hours,
            cost,
        )


def line(what: str, count: int, seconds: float, gpu_hours: float, price: float | None) -> Line:
    """A part of a receipt, rounded. price : of a GPU hour; None for none."""
    cost = None if price is None else Decimal(gpu_hours * price).quantize(_COST)
    return Line(what, count, Decimal(seconds).quantize(_SECONDS), Decimal(gpu_hours).quantize(_HOURS), cost)


def receipt(paid: Line, saved: Line) -> list[Line]:
    """The lines: paid, reused, and their sum, which is what buying all anew would have cost."""
    return [paid, saved, paid + saved]


def receipt_rows(lines: Iterable[Line], currency: str | None) -> list[tuple[str, ...]]:
    """The cells of a receipt's table, the head first."""
    listed = list(lines)
    priced = all(each.cost is not None for each in listed)
    head = ("receipt", "rows and artifacts", "seconds", "GPU hours")
    rows = [head + ((f"cost, {currency}" if currency else "cost",) if priced else ())]
    for each in listed:
        cells = (each.what, f"{each.count:,}", f"{each.seconds:,}", f"{each.gpu_hours:,}")
        rows.append(cells + ((f"{each.cost:,}",) if priced else ()))
    return rows


def receipt_lines(lines: Iterable[Line], currency: str | None) -> list[str]:
    """The receipt as text for a terminal."""
    return table(receipt_rows(lines, currency))
