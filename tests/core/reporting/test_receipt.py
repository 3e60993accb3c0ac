"""The receipt of a run adds up as it is printed."""

from __future__ import annotations

import re
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.reporting.receipt import line, receipt, receipt_lines, receipt_rows

AMOUNTS = st.tuples(
    st.integers(0, 10**9), st.floats(0, 1e8, allow_nan=False), st.floats(0, 1e6, allow_nan=False)
)


@given(AMOUNTS, AMOUNTS, st.none() | st.floats(0, 1e3))
def test_paid_and_reused_are_all_anew_in_every_printed_column(
    paid: tuple[int, float, float], reused: tuple[int, float, float], price: float | None
) -> None:
    lines = receipt(line("paid", *paid, price), line("reused", *reused, price))
    head, *rows = receipt_rows(lines, "EUR")
    assert len(head) == (4 if price is None else 5)
    printed = [[Decimal(cell.replace(",", "")) for cell in row[1:]] for row in rows]
    for one, other, both in zip(*printed, strict=True):
        assert one + other == both
    for row, (count, seconds, hours) in zip(printed, (paid, reused), strict=False):
        assert row[0] == count
        assert abs(float(row[1]) - seconds) <= 0.05 * 1.0001 + 1e-7
        assert abs(float(row[2]) - hours) <= 0.00005 * 1.0001 + 1e-9


def test_a_receipt_by_hand() -> None:
    """0.05 GPU hours at 2 EUR are 0.10 EUR, beside 0.2 hours that were paid before: 0.50 EUR in all."""
    lines = receipt(line("paid", 3, 180.04, 0.05, 2.0), line("reused", 12, 720.0, 0.2, 2.0))
    text = receipt_lines(lines, "EUR")
    assert [re.split(r"\s{2,}", each) for each in (text[0], *text[2:])] == [
        ["receipt", "rows and artifacts", "seconds", "GPU hours", "cost, EUR"],
        ["paid", "3", "180.0", "0.0500", "0.1000"],
        ["reused", "12", "720.0", "0.2000", "0.4000"],
        ["all anew", "15", "900.0", "0.2500", "0.5000"],
    ]
