"""Extract the answer from a completion, and read numbers in free text.

All scorers read numbers in the same way:

- digits with an optional fraction part (`12`, `12.50`, `.5`), comma as thousands separator only
  (`1,234.50`; also LaTeX `1{,}234`, `10,\\!080`, no-break or thin spaces, and two or more groups behind plain
  spaces, `1 234 567`), an exponent (`3e-4`, `3 \\times 10^{-4}`);
- a sign counts where it cannot be an operator: `-3`, `= -3`, `= - 3`, `-$3`, but not in `10-3`, `x-3` or
  `3 - 1`; Unicode minus signs and hyphens are minus, Unicode decimal digits are digits;
- `3/4`, `3 / 4` of two whole numbers and `\\frac{-3}{4}` are a quotient, `5 1/2` and `5\\frac{1}{2}` are 5.5;
  `10/12/2024` is three numbers;
- `2^{10}` is a power, `1011_2` is a number in base 2;
- `$`, `%` and units do not belong to the number: `$5`, `5 %`, `5kg`, `5 cm^2` are 5, and `50%` is not 0.5;
- digits behind a Latin letter belong to a name (`H2O`, `m2`, `x_1`, `USD5`), those behind a LaTeX command do
  not;
- addresses (`https://...`), times of the day (`1:30`), ratios (`3:4`) and footnotes (`12.[1]`) hold none;
- `2.5 million` is 2.5 with the scale 10^6.

Not read: a decimal comma, a product of numbers. Every step is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Literal

Extract = Literal["whole", "last_line", "last_number", "last_integer", "answer_tag"]

#: Arithmetic on extracted numbers: exact operands, 60 digits, and no overflow for any exponent that the
#: reader accepts.
ARITHMETIC = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])

_GROUPED = r"(?<![0-9]\x20)[1-9][0-9]{0,2}(?:\x20[0-9]{3}(?![0-9])){2,}+(?!\x20[0-9])"
_INTEGER = rf"(?:[1-9][0-9]{{0,2}}(?:,[0-9]{{3}}(?![0-9]))++|{_GROUPED}|[0-9]++)"
_DECIMAL = r"[0-9]++(?:\.[0-9]++)?+"
_CURRENCY = r"\\?[$€£¥₹]"
_SLASH = "\u2044"  # of a fraction whose terms are known, unlike `/`
# Possessive quantifiers do not backtrack, so no text takes quadratic time.
_NUMBER_PATTERN = rf"""
    (?: (?: (?<![A-Za-z0-9)\]}}%]) (?P<sign>[-+]) (?:{_CURRENCY}\x20?)?
        | (?: (?<=[=:]\x20) | (?<=\sis\x20) ) (?P<apart>-) \x20 (?=[0-9.]) ) )?
    (?<![A-Za-z0-9])
    (?: (?: (?P<units>[0-9]++) \x20 (?=[0-9]++ (?:/|{_SLASH}) [0-9]) )?
        (?: (?<!/) (?<!/\x20) (?P<over>{_INTEGER}) \x20?/\x20? (?P<under>0*+[1-9][0-9]*+)
            (?! [0-9/] | \x20/ | \.[0-9] )
          | (?P<upper>{_DECIMAL}) {_SLASH} (?P<lower>{_DECIMAL}) )
      | (?: (?P<whole>{_INTEGER}) (?P<fraction>\.[0-9]++)? | (?<!\.) (?P<point>\.[0-9]++) )
        (?: (?P<exponent> [eE] [-+]? [0-9]{{1,3}} (?![A-Za-z0-9]) )
          | \x20?[*x]\x20?10\^ (?P<ten> [-+]?[0-9]{{1,4}} (?![0-9]) )
          | \^ (?P<power> [-+]?[0-9]{{1,3}} (?![0-9]) )
          | _ (?P<base> (?:[2-9]|[12][0-9]|3[0-6]) (?![0-9]) ) )?
    )
"""
_NUMBER = re.compile(_NUMBER_PATTERN, re.VERBOSE)
_ONLY_NUMBER = re.compile(
    rf"\s*+ (?:{_CURRENCY})? \s*+ {_NUMBER_PATTERN} \s*+ (?:\\?%)? \s*+ \.? \s*+", re.VERBOSE
)

_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2013\u2212\ufe63\uff0d", "-"))
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+"
)
_DIGIT = re.compile(r"\d")
_GROUP_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
UNICODE_FRACTION = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPT = re.compile(r"(?<=[0-9])[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]++")
_LATEX_GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;])(?=[0-9]{3}(?![0-9]))")
_LATEX_FRACTION = re.compile(
    r"\\[dtc]?frac\x20?(?:\{\x20?(-?[0-9.]++)\x20?\}|([0-9]))\x20?(?:\{\x20?(-?[0-9.]++)\x20?\}|([0-9]))"
)
_LATEX_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[\u00d7\u00b7]")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]++")
_SCRIPT_BRACES = re.compile(r"(?<=[0-9])([\^_])\{\x20?([-+]?[0-9]{1,4})\x20?\}")
# Exponents and indices of units and variables.
_SCRIPTS = re.compile(
    r"(?<=[A-Za-z)}\]])(?:\x20?\^(?:\{[^{}]{0,20}\}|[-+]?[0-9]++)|_(?:\{[^{}]{0,20}\}|[0-9]++))"
)
_NO_NUMBERS = re.compile(
    r"(?:https?://|www\.)\S++"
    r"|(?<![0-9:.])[0-9]{1,2}:[0-5][0-9](?::[0-5][0-9])?(?![0-9:])"
    r"|(?<![0-9A-Za-z:.,/])[0-9]{1,9}(?:\.[0-9]{1,9})?:[0-9]{1,9}(?![0-9:])(?!\.[0-9]{10})(?:\.[0-9]{1,9})?"
    r"|(?<=[A-Za-z0-9.,;:!?)%*])\[[0-9]{1,3}\]"
)

_SCALE_WORD = re.compile(r"\x20?(thousand|million|billion|trillion)\b", re.IGNORECASE)
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text: its plain spelling (no separators, no plus sign) and its value.

    scale : 10^6 if the word "million" follows it, and so on; the value does not include it.
    """

    text: str
    value: Decimal
    scale: int = 1

    @property
    def spelled(self) -> str:
        """The number with the word of its scale, such as "2.5 million"."""
        word = next((word for word, scale in SCALES.items() if scale == self.scale), "")
        return f"{self.text} {word}".strip()


def extract(text: str, how: Extract) -> str | None:
    """Return the answer in a completion, or None.

    how : "whole" is the text without outer white space; "last_line" the last line that is not empty;
        "last_number" the last number, plainly spelled; "last_integer" the last number with a whole value, as
        digits; "answer_tag" the text between the last `<answer>` and its `</answer>` (any case).
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
    """Return the last number in a text."""
    last = None
    for last in _NUMBER.finditer(_plain(text)):  # noqa: B007 (only the last match is converted)
        pass
    return _number(last) if last else None


def last_integer(text: str) -> Number | None:
    """Return the last number in a text with a whole value: `12.0` is 12, `12.5` is skipped."""
    for match in reversed(list(_NUMBER.finditer(_plain(text)))):
        value = _number(match).value
        if value == value.to_integral_value(context=ARITHMETIC):
            return Number(f"{value:.0f}" if value else "0", value)
    return None


def numbers(text: str) -> Iterator[Number]:
    """Yield all numbers in a text, from left to right."""
    return map(_number, _NUMBER.finditer(_plain(text)))


def only_number(text: str) -> Number | None:
    """Return the number if the whole text is one; a currency sign, `%` and a full stop are allowed."""
    match = _ONLY_NUMBER.fullmatch(_plain(text))
    return _number(match) if match else None


def ascii_numbers(text: str) -> str:
    """Return the text with Unicode minus signs and hyphens as `-` and Unicode digits as 0 to 9."""
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
    sign = "-" if match["sign"] == "-" or match["apart"] else ""
    if match["over"] or match["upper"]:
        return _quotient(match, sign)
    whole = _digits(match["whole"] or "0")
    mantissa = f"{sign}{whole}{match['fraction'] or match['point'] or ''}"
    if match["power"]:
        return _power(sign, mantissa.lstrip("-"), int(match["power"]))
    if match["base"] and not match["fraction"]:
        base = int(match["base"])
        if all(int(digit) < base for digit in whole) and base != 10:
            value = ARITHMETIC.create_decimal(int(f"{sign}{whole[:1000]}", base))
            return Number(f"{value:f}", value)
    exponent = f"e{match['ten']}" if match["ten"] else match["exponent"] or ""
    word = _SCALE_WORD.match(match.string, match.end())
    scale = SCALES[word[1].lower()] if word else 1
    return Number(mantissa + exponent, Decimal(mantissa + exponent), scale)


def same_numbers(wanted: Number, found: Number, within: Callable[[Decimal, Decimal], bool]) -> bool:
    """Whether two numbers are equal by `within`. A word such as "million" may be left out of one of them.

    "2.5 million" equals 2.5 and 2,500,000, but not "2.5 billion".
    """
    scaled = [ARITHMETIC.multiply(number.value, Decimal(number.scale)) for number in (wanted, found)]
    if within(scaled[0], scaled[1]):
        return True
    return (wanted.scale == 1) != (found.scale == 1) and within(wanted.value, found.value)


def _quotient(match: re.Match[str], sign: str) -> Number:
    over = _digits(match["over"] or match["upper"])
    under = _digits(match["under"] or match["lower"])
    top, bottom = Decimal(over), Decimal(under)
    if not bottom:
        return Number("0", Decimal(0))
    if match["units"]:
        top = ARITHMETIC.fma(Decimal(match["units"]), bottom, top)
        over = f"{top:f}"
    value = ARITHMETIC.divide(top, bottom)
    return Number(f"{sign}{over}/{under}", -value if sign else value)


def _power(sign: str, base: str, power: int) -> Number:
    """Return a power, spelled out if it is a whole number below 10^50."""
    value = ARITHMETIC.power(Decimal(base), power)
    if not value.is_finite():  # 0 to a negative power
        return Number("0", Decimal(0))
    spelled = value == value.to_integral_value(context=ARITHMETIC) and value < Decimal(10) ** 50
    text = f"{value:.0f}" if spelled else f"{base}^{power}"
    return Number(sign + text, -value if sign else value)


def _digits(text: str) -> str:
    return text.replace(",", "").replace(" ", "")


def _plain(text: str) -> str:
    """Return the text with its numbers in ASCII and without LaTeX, as `_NUMBER` reads them."""
    if not text.isascii():
        text = _GROUP_SPACE.sub(",", ascii_numbers(text))
        text = _SUPERSCRIPT.sub(lambda raised: "^" + raised[0].translate(_RAISED), text)
        text = UNICODE_FRACTION.sub(lambda one: " " + unicodedata.normalize("NFKC", one[0]), text)
    text = _NO_NUMBERS.sub(" ", text)
    if "\\" in text or "{,}" in text:
        text = _LATEX_GROUP.sub(",", text.replace("\\!", ""))
        text = _LATEX_FRACTION.sub(_spell_fraction, text)
    text = _LATEX_TIMES.sub("*", text)
    if "^" in text or "_" in text:
        text = _SCRIPT_BRACES.sub(r"\1\2", _SCRIPTS.sub("", text))
    return _LATEX_COMMAND.sub(" ", text) if "\\" in text else text


def _spell_fraction(match: re.Match[str]) -> str:
    over, under = match[1] or match[2], match[3] or match[4]
    sign = "-" if over.startswith("-") != under.startswith("-") else ""
    # The space keeps 2\frac{1}{2} from becoming 21/2.
    space = " " if match.start() and match.string[match.start() - 1].isalnum() else ""
    return f"{space}{sign}{over.lstrip('-')}{_SLASH}{under.lstrip('-')}"
