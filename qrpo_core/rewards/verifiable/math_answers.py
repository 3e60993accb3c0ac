r"""Decide whether two mathematical answers are the same, where that can be decided exactly.

Plain numbers are compared as exact fractions, with their units, percent signs and bases. Times of the day,
words and letters are compared as such; lists, sets, tuples and intervals element by element. For other
expressions (roots, variables, functions) the verdict is None, and a computer algebra system decides.
"""

from __future__ import annotations

import re
from fractions import Fraction

from qrpo_core.rewards.verifiable.extract import SCALES
from qrpo_core.rewards.verifiable.numerals import Reading, read
from qrpo_core.rewards.verifiable.spelling import spelled

_WORD = "\x01"  # stands before and behind words of \text{} in a normal form
_REPLACED = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|!)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])|[\u00d7\u00b7\u2217]"), "*"),
    (re.compile(r"\\(?:div)(?![A-Za-z])|\u00f7"), "/"),
    (re.compile(r"(?<=[0-9])\s*x\s*(?=10\s*\^)"), "*"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,|\\;|\\ |\{ \})(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"(?:\\|(?<![A-Za-z0-9]))[$](?=\s*[0-9.])|[€£¥₹]"), ""),
    (re.compile(r"\\%|\\?%|\\text\s?\{\s*percent\s*\}|\bpercent\b"), "%"),
    (
        re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\u00b0|\s*\\degree(?![A-Za-z])"),
        "\x01degree\x01",
    ),
    (re.compile(r"\\infin(?![A-Za-z])"), r"\\infty"),
    (re.compile(r"\u221a\s*([0-9]+)"), r"\\sqrt{\1}"),
    (
        re.compile(
            r"(?<=[0-9])\s*(?:\^\s?\{?\s?)?\\text\s?\{\s*(?:st|nd|rd|th)\s*\}\}?|(?<=[0-9])(?:st|nd|rd|th)(?![A-Za-z])"
        ),
        "",
    ),
]
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|textit|mathbf|operatorname|hbox)\s?\{([^{}]*)\}")
_CONNECTIVE = re.compile(r"\s*,?\s*(?:\x01\s*(?:and|or)\s*\x01|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_GROUPS = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")

_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})\s*\x01?\s*([ap]\.?\s*m\.?)?\s*\x01?", re.IGNORECASE)
_BASES = {
    word: place + 2
    for place, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"eleven": 11, "twelve": 12, "sixteen": 16}
_BASED = re.compile(r"([0-9A-Z][0-9A-Za-z]*)_(?:\{\s*([^{}]*?)\s*\}|([0-9]))")
_LABEL = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\{[^{}=]*\}|\w))?(?:\([A-Za-z](?:,\s?[A-Za-z])*\))?\s*(?:=|\\in(?![A-Za-z]))\s*"
)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
_CHOICE = re.compile(r"\(?([A-Z])(?:\)|[.:](?=\s)).*", re.DOTALL)

_UNITS = {
    alias: name
    for name, aliases in {
        "m": "m meter metre", "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre",
        "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard",
        "mi": "mi mile", "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day",
        "week": "week", "year": "yr year", "g": "g gm gram", "kg": "kg kilogram", "mg": "mg milligram",
        "lb": "lb pound", "oz": "oz ounce", "l": "l liter litre", "ml": "ml milliliter millilitre",
        "dollar": "dollar", "cent": "cent", "degree": "degree", "mph": "mph",
    }.items()
    for alias in aliases.split()
}  # fmt: skip


def normal(text: str) -> str:
    r"""Return an answer in normal form: no layout macros, `_WORD` around `\text{}`, "and" as a comma."""
    text = spelled(text).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * len(opening):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner.replace("\\$", ""):
                text = inner
    text = text.strip().strip("*`").rstrip(" .,;").lstrip()
    text = re.sub(r",\s*\\!\s*", ",", text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "") if "$" in text else text
    text = _TEXT.sub(f"{_WORD}\\1{_WORD}", text)
    text = _CONNECTIVE.sub(", ", text)
    return " ".join(text.split()).strip().rstrip(".,;")


def same_answer(ground_truth: str, answer: str) -> bool | None:
    """Return whether two answers are the same; None if this module cannot decide.

    ground_truth, answer : LaTeX or plain text of the answer alone.
    """
    return _same(normal(ground_truth), normal(answer))


def is_readable(ground_truth: str) -> bool:
    """Whether `same_answer` can compare this answer with others."""
    wanted = normal(ground_truth)
    parts = _parts(wanted)
    if parts is not None:
        return all(is_readable(part) for part in parts[1])
    exact = _quantity(wanted) or _CLOCK.fullmatch(wanted) or _based(wanted)
    return exact is not None or bool(_words(wanted))


def is_quantity(answer: str) -> bool:
    """Whether an answer is a plain number, perhaps with a unit or a percent sign."""
    text = normal(answer)
    return _quantity(_without_label(text, "")[0]) is not None


def for_algebra(answer: str) -> str:
    """Return an answer as LaTeX for a computer algebra system: no currency signs, no 3e8, no 5 1/2."""
    text = re.sub(r"\\\$|^\$(?!.*\$)|[€£¥₹]", "", spelled(answer)).strip("$`").strip()
    text = re.sub(r"\\(?:mathrm|text|textrm|rm)\s?\{\s*([a-zA-Z])\s*\}", r"\1", text)
    text = re.sub(r"(?<=[0-9])[eE]([-+]?[0-9]{1,4})(?![0-9A-Za-z])", r"\\times 10^{\1}", text)
    return re.sub(r"(?<![0-9/.])([0-9]+) ([0-9]+)\s?/\s?([0-9]+)", r"\1\\frac{\2}{\3}", text)


def _same(one: str, two: str) -> bool | None:
    if _bare(one) == _bare(two):
        return bool(_bare(one))
    one, two = _without_label(one, two)
    if _bare(one) == _bare(two):
        return True
    for decide in (_same_clock, _same_based, _same_quantity, _same_words, _same_parts):
        verdict = decide(one, two)
        if verdict is not None:
            return verdict
    return None


def _bare(text: str) -> str:
    """Return an answer without white space and needless braces."""
    text = re.sub(r"\{([0-9A-Za-z])\}", r"\1", text.replace(_WORD, ""))
    return re.sub(r"\s", "", text).rstrip(".").replace("\\frac", "\\frac ")


def _without_label(one: str, two: str) -> tuple[str, str]:
    """Return both answers without a leading `x =`; kept if they begin with different ones."""
    first, second = _LABEL.match(one), _LABEL.match(two)
    if first and second and _bare(first[0]) != _bare(second[0]):
        return one, two
    if first and (second or "=" not in two):
        one = one[first.end() :]
    if second and (first or "=" not in one):
        two = two[second.end() :]
    return one, two


def _same_clock(one: str, two: str) -> bool | None:
    times = [_CLOCK.fullmatch(text) for text in (one, two)]
    if not any(times):
        return None
    first, second = times
    if first is None or second is None:
        return False
    halves = [re.sub(r"[^apm]", "", (time[3] or "").lower()) for time in (first, second)]
    return (int(first[1]), first[2]) == (int(second[1]), second[2]) and (
        halves[0] == halves[1] or "" in halves
    )


def _same_based(one: str, two: str) -> bool | None:
    first, second = _based(one), _based(two)
    return None if first is None and second is None else first == second


def _based(text: str) -> tuple[str, int] | None:
    """Return digits and base of `1011_2`, `52_{8}`, `1A_{\\text{sixteen}}`."""
    match = _BASED.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    name = re.sub(r"base|\x01", "", match[2] or match[3]).strip()
    name = str(_BASES.get(name, name))
    if not re.fullmatch(r"[0-9]{1,2}", name) or not 2 <= int(name) <= 36:
        return None
    return match[1].upper().lstrip("0"), int(name)


def _same_quantity(one: str, two: str) -> bool | None:
    first, second = _quantity(one), _quantity(two)
    if first is None or second is None:
        return None
    (wanted, unit, percent), (found, other, also_percent) = first, second
    scales = [_scale(wanted), _scale(found)]
    if max(scales) > 1:
        # One answer may leave "million" out, but "million" is not "billion".
        plain = 1 in scales and wanted.value == found.value
        return plain or wanted.value * scales[0] == found.value * scales[1]
    if unit and other and unit != other:
        return False
    if percent == also_percent:
        return _equal(wanted, found)
    factor = Fraction(1, 100) if percent else Fraction(100)
    return wanted.value == found.value or wanted.value * factor == found.value


def _equal(wanted: Reading, found: Reading) -> bool:
    if wanted.value == found.value:
        return True
    # A decimal with six or more digits may stand for a fraction without an end.
    for exact, short in ((wanted, found), (found, wanted)):
        if short.decimal and not exact.decimal and short.digits >= 6 and _endless(exact.value):
            limit = abs(exact.value) / 10 ** (short.digits - 1)
            return bool(abs(exact.value - short.value) <= limit)
    return False


def _endless(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1


def _quantity(text: str) -> tuple[Reading, str, bool] | None:
    """Return (plain number, its unit or "" for none or an unknown one, whether it is a percentage)."""
    number = read(text)
    if number is None:
        return None
    rest, percent = number.rest, False
    if rest.startswith("%"):
        rest, percent = rest[1:].strip(), True
    if not rest:
        return number, "", percent
    unit = re.sub(r"\s+", " ", rest.replace(_WORD, " ")).strip().lower().rstrip(".")
    if not re.fullmatch(r"[a-z][a-z '.-]*(?:\^\s?\{?[23]\}?)?(?:\s?/\s?[a-z]+)?", unit):
        return None
    if _WORD not in rest and not re.match(r"[a-z]{2,}", unit):
        return None  # a variable: 5x
    return number, _unit(unit), percent


def _scale(number: Reading) -> int:
    word = re.match(r"[\s\x01]*(thousand|million|billion|trillion)\b", number.rest, re.IGNORECASE)
    return SCALES[word[1].lower()] if word else 1


def _unit(words: str) -> str:
    power = re.search(r"\^\s?\{?([23])\}?", words)
    words = words[: power.start()] if power else words
    dimension = power[1] if power else ""
    names = re.findall(r"[a-z]+", words)
    for word, dimensions in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
        if word in names and len(names) > 1:
            names.remove(word)
            dimension = dimensions
    if len(names) != 1:
        return ""
    name = names[0]
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    return f"{known}{dimension}" if known else ""


def _same_words(one: str, two: str) -> bool | None:
    wanted, found = _words(one), _words(two)
    if wanted is None:
        return None
    if (letter := _LETTER.fullmatch(one.replace(_WORD, "").strip())) is not None:
        text = two.replace(_WORD, "").strip()
        chosen = _LETTER.fullmatch(text) or _CHOICE.fullmatch(text)
        return letter[1] == chosen[1] if chosen else None
    return None if found is None else wanted == found


def _words(text: str) -> str | None:
    r"""Return an answer of words alone without case and punctuation: `\text{Yes}`, `east`, `(C)`."""
    plain = text.replace(_WORD, " ").strip()
    inside = "".join(text.split(_WORD)[1::2])
    outside = "".join(text.split(_WORD)[::2])
    if re.search(r"[A-Za-z]", inside) and not re.search(r"[A-Za-z0-9\\=+^_]", outside):
        return " ".join(re.findall(r"[a-z0-9]+", plain.lower()))
    letter = _LETTER.fullmatch(plain)
    if letter or re.fullmatch(r"[A-Za-z][A-Za-z]+(?:[ '-][A-Za-z]+)*[.!]?", plain):
        return " ".join(re.findall(r"[a-z]+", plain.lower()))
    return None


def _same_parts(one: str, two: str) -> bool | None:
    first, second = _parts(one), _parts(two)
    if first is None or second is None:
        lone, several = (one, second) if first is None else (two, first)
        if several is None or several[0]:
            return None
        # Several different answers are wrong; the same answer several times counts once.
        verdicts = [_same(member, lone) for member in several[1]]
        return False if False in verdicts else None if None in verdicts else True
    (brackets, wanted), (others, found) = first, second
    if {brackets, others} <= {"", "{}"}:
        return _same_members(wanted, found)
    if brackets != others:
        # A list without brackets may be a tuple; (1, 2) is not (1, 2].
        return None if "" in (brackets, others) else False
    if len(wanted) != len(found):
        return False
    verdicts = [_same(left, right) for left, right in zip(wanted, found, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _same_members(wanted: list[str], found: list[str]) -> bool | None:
    """Return whether two lists hold the same answers in any order; None if undecided."""
    if len(wanted) != len(found):
        return False
    left = list(found)
    for member in wanted:
        verdicts = [_same(member, other) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            return None
        else:
            return False
    return True


def _parts(text: str) -> tuple[str, list[str]] | None:
    """Return (brackets or "", elements) of a list, set, tuple or interval; None for other text."""
    inner, brackets = text, ""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing):
            inner, brackets = text[len(opening) : -len(closing)], (opening + closing).replace("\\", "")
            break
    elements = _split(inner)
    if elements is None:  # (1, 2), (3, 4): the outer brackets are not one pair
        brackets, elements = "", _split(text) if brackets else None
    return (brackets, elements) if elements and (len(elements) > 1 or brackets == "{}") else None


def _split(text: str) -> list[str] | None:
    """Return the elements between commas outside brackets; None if the brackets do not match."""
    text = _GROUPS.sub(lambda group: group[0].replace(",", ""), text)
    depth, start, found = 0, 0, []
    for place, sign in enumerate(text):
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif sign == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    found.append(text[start:].strip())
    return found if depth == 0 and all(found) else None
