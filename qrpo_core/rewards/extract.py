"""Which part of a completion is the answer, and how numbers are read in free text.

One reading of numbers serves every scorer:

- digits with an optional fraction part (`12`, `12.50`, `.5`), comma as thousands separator only
  (`1,234.50`; also LaTeX `1{,}234`, `10,\\!080` and no-break or thin spaces), an exponent (`3e-4`);
- a sign counts where it cannot be an operator: `-3`, `= -3`, `-$3`, but not in `10-3`, `x-3` or `3 - 1`;
  Unicode minus signs and hyphens are minus, Unicode decimal digits are digits;
- `3/4` and `\\frac{3}{4}` of two whole numbers are a quotient; `10/12/2024` is three numbers;
- `$`, `%` and units do not belong to the number: `$5`, `5 %`, `5kg` are 5, and `50%` is not 0.5;
- digits behind a Latin letter belong to a name (`H2O`, `m2`, `USD5`); behind a LaTeX command they do not.

Not read: a decimal comma, mixed numbers (`2 1/2`), powers (`10^3`), numbers in words, a minus sign with a
space before its number. Every step is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Literal

Extract = Literal["whole", "last_line", "last_number", "last_integer", "answer_tag"]

#: Arithmetic on extracted numbers: exact operands, 60 digits, and no exponent that a completion can write
#: overflows it.
ARITHMETIC = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)"
_CURRENCY = r"\\?[$€£¥₹]"
# Possessive quantifiers: what a part has consumed is never tried again, so no text takes quadratic time.
_NUMBER_PATTERN = rf"""
    (?: (?<![A-Za-z0-9)\]}}%]) (?P<sign>[-+]) (?:{_CURRENCY}\x20?)? )?
    (?<![A-Za-z0-9])
    (?: (?<!/) (?P<over>{_INTEGER}) / (?P<under>0*+[1-9][0-9]*+) (?! [0-9/] | \.[0-9] )
      | (?: (?P<whole>{_INTEGER}) (?P<fraction>\.[0-9]++)? | (?<!\.) (?P<point>\.[0-9]++) )
        (?P<exponent> [eE] [-+]? [0-9]{{1,3}} (?![A-Za-z0-9]) )?
    )
"""
_NUMBER = re.compile(_NUMBER_PATTERN, re.VERBOSE)
_ONLY_NUMBER = re.compile(
    rf"\s*+ (?:{_CURRENCY})? \s*+ {_NUMBER_PATTERN} \s*+ (?:\\?%)? \s*+ \.? \s*+", re.VERBOSE
)

_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2013\u2212\ufe63\uff0d", "-"))
_DIGIT = re.compile(r"\d")
_GROUP_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_LATEX_GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;])(?=[0-9]{3}(?![0-9]))")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac(?:\{([0-9]++)\}\{([0-9]++)\}|([0-9])([0-9]))")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]++")

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Number:
    """A number found in a text: its plain spelling (no separators, no plus sign) and its value."""

    text: str
    value: Decimal


def extract(text: str, how: Extract) -> str | None:
    """The part of a completion that is its answer, or None where there is none.

    how : "whole", the text without outer white space; "last_line", the last line with anything in it;
        "last_number", the last number, plainly spelled; "last_integer", the last number whose value is a
        whole number (others are passed over), as digits; "answer_tag", what stands between the last
        `<answer>` and its `</answer>` (any case).
    """
    match how:
        case "whole":
            return text.strip() or None
        case "last_line":
            lines = text.rstrip().splitlines()
            return lines[-1].strip() if lines else None
        case "answer_tag":
            return _last_answer(text)
        case "last_number":
            number = last_number(text)
            return number.text if number else None
        case "last_integer":
            number = last_integer(text)
            return number.text if number else None


def last_number(text: str) -> Number | None:
    """The last number in a text."""
    last = None
    for last in _NUMBER.finditer(_plain(text)):  # noqa: B007 (only the last match is converted)
        pass
    return _number(last) if last else None


def last_integer(text: str) -> Number | None:
    """The last number in a text whose value is whole; `12.0` is 12, `12.5` is passed over."""
    for match in reversed(list(_NUMBER.finditer(_plain(text)))):
        value = _number(match).value
        if value == value.to_integral_value(context=ARITHMETIC):
            return Number(f"{value:.0f}" if value else "0", value)
    return None


def numbers(text: str) -> Iterator[Number]:
    """All numbers in a text, from left to right."""
    return map(_number, _NUMBER.finditer(_plain(text)))


def only_number(text: str) -> Number | None:
    """The number that the whole text is, or None: a currency sign, `%` and a full stop are let pass."""
    match = _ONLY_NUMBER.fullmatch(_plain(text))
    return _number(match) if match else None


def ascii_numbers(text: str) -> str:
    """The text with Unicode minus signs and hyphens as `-` and Unicode decimal digits as 0 to 9."""
    if text.isascii():
        return text
    return _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_MINUS))


def _last_answer(text: str) -> str | None:
    start, found = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()], None
    return found.strip() or None if found is not None else None


def _number(match: re.Match[str]) -> Number:
    sign = "-" if match["sign"] == "-" else ""
    if match["over"]:
        over = sign + match["over"].replace(",", "")
        value = ARITHMETIC.divide(Decimal(over), Decimal(match["under"]))
        return Number(f"{over}/{match['under']}", value)
    whole = (match["whole"] or "0").replace(",", "")
    text = f"{sign}{whole}{match['fraction'] or match['point'] or ''}{match['exponent'] or ''}"
    return Number(text, Decimal(text))


def _plain(text: str) -> str:
    """The same numbers in ASCII without LaTeX: the spelling that `_NUMBER` reads."""
    if not text.isascii():
        text = _GROUP_SPACE.sub(",", ascii_numbers(text))
    if "\\" in text or "{,}" in text:
        text = _LATEX_GROUP.sub(",", text.replace("\\!", ""))
        text = _LATEX_FRACTION.sub(_spell_fraction, text)
        text = _LATEX_COMMAND.sub(" ", text)
    return text


def _spell_fraction(match: re.Match[str]) -> str:
    over, under = match[1] or match[3], match[2] or match[4]
    # The space keeps 2\frac{1}{2} from becoming 21/2.
    space = " " if match.start() and match.string[match.start() - 1].isalnum() else ""
    return f"{space}{over}/{under}"
