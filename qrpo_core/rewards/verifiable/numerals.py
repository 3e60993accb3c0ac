"""Exact values of plain numbers and arithmetic in LaTeX or plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TOKEN = re.compile(
    r"\s*+(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]*+)?|\.[0-9]++)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,5}(?![A-Za-z0-9]))?"
    r"|(?P<frac>\\frac)(?![A-Za-z])|(?P<sign>[-+*/^!(){}]))"
)

#: Limits on numbers: time and memory of a power grow with its exponent.
_MOST_BITS = 50_000
_MOST_DIGITS = 4000


class _NotPlain(Exception):
    """The text is not arithmetic on written numbers."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A number at the beginning of a text.

    value : its exact value.
    decimal : whether it is written as one decimal number. digits : the significant digits of that number.
    rest : the text behind it.
    """

    value: Fraction
    decimal: bool
    digits: int
    rest: str


def read(text: str) -> Reading | None:
    r"""Return the number at the beginning of a text: `-3`, `1,234.5`, `3e8`, `2\frac{1}{2}`, arithmetic.

    It reads + - * / ^ ! and parentheses, all spellings of `\frac`, and mixed numbers. `\times` and `\cdot`
    must be `*` already. None if the text begins with anything else, or divides by zero.
    """
    reader = _Reader(text)
    try:
        value = reader.sum()
    except (_NotPlain, ZeroDivisionError, ValueError, OverflowError, RecursionError):
        return None
    return Reading(value, reader.terms == 1, reader.digits, text[reader.place :].strip())


class _Reader:
    """Recursive descent over the tokens of a text. terms : number of numbers and operators read so far."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.terms, self.digits = text, 0, 0, 0
        self._depth = 0

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.place)

    def _sign(self, among: str) -> str | None:
        match = self._peek()
        if match and match["sign"] and match["sign"] in among:
            self.place = match.end()
            return match["sign"]
        return None

    def _need(self, sign: str) -> None:
        if self._sign(sign) is None:
            raise _NotPlain

    def sum(self) -> Fraction:
        value = self._product()
        while sign := self._sign("+-"):
            self.terms += 1
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while True:
            if sign := self._sign("*/"):
                self.terms += 1
                other = self._signed()
                value = value * other if sign == "*" else value / other
            elif (match := self._peek()) and match["sign"] == "(":
                self.terms += 1
                value *= self._power()
            else:
                return value

    def _signed(self) -> Fraction:
        if sign := self._sign("+-"):
            return -self._signed() if sign == "-" else self._signed()
        return self._power()

    def _power(self) -> Fraction:
        value = self._atom()
        while sign := self._sign("^!"):
            self.terms += 1
            value = self._raised(value) if sign == "^" else _factorial(value)
        return value

    def _raised(self, base: Fraction) -> Fraction:
        exponent = self._group() if self._sign("{") else self._signed_digit()
        if exponent.denominator != 1:
            raise _NotPlain
        size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if abs(exponent) * size > _MOST_BITS:
            raise _NotPlain
        return base ** int(exponent)

    def _signed_digit(self) -> Fraction:
        # Read 10^-3 and 10^12 as plain text does; LaTeX would take one digit.
        if sign := self._sign("+-"):
            return -self._number() if sign == "-" else self._number()
        return self._group_of("(") if self._sign("(") else self._number()

    def _atom(self) -> Fraction:
        self._depth += 1
        if self._depth > 50:
            raise _NotPlain
        try:
            match = self._peek()
            if match is None:
                raise _NotPlain
            if match["frac"]:
                self.terms += 2
                self.place = match.end()
                return self._term() / self._term()
            if self._sign("("):
                return self._group_of("(")
            if self._sign("{"):
                return self._group()
            return self._mixed(self._number())
        finally:
            self._depth -= 1

    def _mixed(self, whole: Fraction) -> Fraction:
        r"""Return the value of `5\frac{1}{2}` or `5 1/2`, or the whole number if no fraction follows."""
        match = self._peek()
        if match is None or whole.denominator != 1:
            return whole
        start = self.place
        if match["frac"]:
            part = self._atom()
        elif re.match(r"\s++[0-9]++\s?/\s?[0-9]++(?![0-9])", self.text[start : start + 40]):
            over = self._number()
            self._need("/")
            part = over / self._number()
        else:
            return whole
        if not 0 <= part < 1:
            raise _NotPlain
        self.terms += 1
        return whole + part

    def _term(self) -> Fraction:
        r"""Return an argument of `\frac`: a group, or one digit."""
        if self._sign("{"):
            return self._group()
        match = re.compile(r"\s*+([0-9])").match(self.text, self.place)
        if match is None:
            raise _NotPlain
        self.place = match.end()
        return Fraction(int(match[1]))

    def _group(self) -> Fraction:
        value = self.sum()
        self._need("}")
        return value

    def _group_of(self, opening: str) -> Fraction:
        value = self.sum()
        self._need({"(": ")"}[opening])
        return value

    def _number(self) -> Fraction:
        match = self._peek()
        if match is None or not match["number"]:
            raise _NotPlain
        self.place = match.end()
        self.terms += 1
        number = match["number"].replace(",", "")
        if len(number) > _MOST_DIGITS:
            raise _NotPlain
        self.digits = len(number.replace(".", "").lstrip("0"))
        exponent = match["exponent"] or ""
        if exponent and abs(int(exponent[1:])) > _MOST_DIGITS:
            raise _NotPlain
        return Fraction((number.rstrip(".") or "0") + exponent)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 3000:
        raise _NotPlain
    import math

    return Fraction(math.factorial(int(value)))
