"""Numbers, percentages, durations and sizes as text, the same everywhere."""

from __future__ import annotations

import math
import re

_UNITS = ("B", "kB", "MB", "GB", "TB")


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """A number with fixed decimals; scientific notation from 1e9 on; never "-0.0"."""
    sign = "+" if signed and value > 0 else ""
    if abs(value) >= 1e9:
        return f"{value:{sign}.3e}"
    text = f"{value:{sign},.{decimals}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal; "< 0.1 %" and "> 99.9 %" near but not at 0 and 1."""
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.1f} %"


def decimals_for(value: float, width: float | None) -> int:
    """The decimals that show two significant digits of `width` (an error or half an interval), at most 9.

    Without a width: three significant digits of the value.
    """
    scale, digits = (width, 2) if width else (abs(value), 3)
    if scale == 0:
        return digits
    return min(9, max(0, digits - 1 - math.floor(math.log10(scale))))


def with_error(value: float, error: float | None, unit: str = "") -> str:
    """`value ± standard error unit`, or `value unit` without an error."""
    decimals = decimals_for(value, error)
    text = number(value, decimals)
    if error is not None:
        text += f" ± {number(error, decimals)}"
    return f"{text} {unit}".rstrip()


def duration(seconds: float) -> str:
    """A duration as text: 1.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def size(count: int) -> str:
    """A number of bytes in powers of 1000, with three digits: 999 B, 1.23 kB, 45.6 MB."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_UNITS[-1]}"


def to_the_second(moment: str) -> str:
    """An ISO 8601 moment without fractions of a second."""
    return re.sub(r"\.\d+", "", moment)
