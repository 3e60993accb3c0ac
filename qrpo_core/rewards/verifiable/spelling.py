r"""Rewrite the signs and words of answers in ASCII and LaTeX."""

from __future__ import annotations

import re
import unicodedata

from qrpo_core.rewards.verifiable.extract import UNICODE_FRACTION, ascii_numbers

_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b"
_SUPERSCRIPT = re.compile(rf"(?<=[0-9A-Za-z)\]}}])[{_RAISED}]+")
_DOTS = r"(?:\\[lc]?dots(?![A-Za-z])|\.\.\.|\u2026)"
#: 0.1\overline{6}, and 0.1666... where the same digits stand three times.
_OVERLINED = re.compile(
    r"(?<![0-9.])([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar)\s?(?:\{\s?([0-9]{1,20})\s?\}|([0-9]))"
)
_DOTTED = re.compile(rf"(?<![0-9.])([0-9]{{0,20}})\.([0-9]{{0,8}}?)([0-9]{{1,8}}?)\3{{2,8}}\s?{_DOTS}")
#: Signs of mathematics as commands of LaTeX.
_SIGNS = str.maketrans(
    {
        "\u221e": r"\infty ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2205": r"\emptyset ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u00b1": r"\pm ",
        "\u2208": r"\in ",
        "\u03c0": r"\pi ",
    }
)
_COLOUR = re.compile(r"\\(?:text)?color\s?\{[a-zA-Z]{1,20}\}")
#: Words before an answer inside its box: "The answer is".
_INTRODUCTION = re.compile(r"^\s*\\(?:text|mbox)\s?\{[^{}]{0,80}(?:\b(?:is|are)|[:=])\s*\}\s*(?=\S)")


def spelled(text: str) -> str:
    r"""Return an answer with `^{-4}` for raised digits, and `\frac` for ½ and for decimals without end."""
    text = _INTRODUCTION.sub("", _COLOUR.sub("", text))
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
        text = UNICODE_FRACTION.sub(_fraction, text).translate(_SIGNS)
    text = ascii_numbers(text)
    if "." in text:
        text = _OVERLINED.sub(lambda found: _repeating(found[1], found[2], found[3] or found[4]), text)
        text = _DOTTED.sub(lambda found: _repeating(found[1], found[2], found[3]), text)
    return text


def _fraction(sign: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", sign[0]).partition("\u2044")
    return rf"\frac{{{over}}}{{{under}}}" if under else sign[0]


def _repeating(whole: str, once: str, period: str) -> str:
    r"""Return the fraction of a repeating decimal: 0.1\overline{6} is (16 - 1) / 90."""
    over = int(whole + once + period) - int(whole + once or "0")
    return rf"\frac{{{over}}}{{{10 ** len(once) * (10 ** len(period) - 1)}}}"
