r"""What a text states as its answer: in a `\boxed{}`, behind `####`, or after "the answer is"."""

from __future__ import annotations

import re
from collections import deque
from itertools import pairwise

from qrpo_core.rewards.verifiable.extract import Number, last_number, numbers

_BOX = re.compile(r"\\(?:boxed|fbox)\s*+(?:(\{)|([^\s{}$\\.,]))")
#: Number of boxes that are read, from the end, and longest box in characters.
_MOST_BOXES, _LONGEST_BOX = 20, 5000
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
#: Text between two boxes of one answer.
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:\\(?:text|mbox)\{\s*)?(?:and|or)?\s*\}?[\s$,;]*")

_SAYS = re.compile(
    r"\banswers?\b[*_\s]*+(?:\([^()\n]{0,40}\)\s?)?(?:(?:is|are|=)\b|[:=])[:=*_ \t]*+", re.IGNORECASE
)
_HEADING = re.compile(r"^[#*_ \t]*+(?:the\s)?(?:final\s)?answers?[*_: \t]*+$", re.IGNORECASE | re.MULTILINE)

#: Words between "the answer is" and its number.
_HEAD = re.compile(
    r"""[\s$*_("'\[]*+
    (?:(?:about|approximately|around|roughly|exactly|only|just|simply|thus|therefore|now|equal\ to|indeed)\s++
      |[A-Za-z]\w{0,11}\s*=\s*)*+
    [\s$*_("'\[]*+
    (?= -?\s? (?:\\?[$€£¥₹]\s?|\\[dtc]?frac|\.)? [0-9] | -?\s?\\[dtc]?frac | [\u00bc-\u00be\u2212] )""",
    re.VERBOSE | re.IGNORECASE,
)
#: The left side of an equation: a calculation or a variable.
_CALCULATION = re.compile(
    r"(?:[\s0-9$()+*/x×÷^{}.,_-]|\\(?:times|cdot|div)(?![A-Za-z]))*+|[\s$]*+\w{1,12}\s*+"
)

_SPACED_MINUS = re.compile(r"^[\s$*]*+[-\u2212]\s?(?=[0-9.\\])")

#: Parentheses with words or a time of the day; `\(` opens a formula.
_ASIDE = re.compile(r"(?<!\\)\((?=[^()\n]*(?:[A-Za-z]{2}|[0-9]:[0-9]))[^()\n]*\)")

#: Start, end and content of a formula.
_Formula = tuple[int, int, str]
_FORMULA = re.compile(
    r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$((?:\\.|[^$\\\n]){1,1000})\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,2000}?)\\\]",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|\s\(")

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * (place + 2) for place, word in enumerate(_TENS)
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def stated_answer(text: str) -> str | None:
    r"""Return the part of a text that it calls its answer, or None.

    That is the last `\boxed{}` with a closing brace (several joined by "and", "or" or a comma are one list),
    else the line behind the last `####`, else the line behind the last "answer is", "answer:" or heading
    "Answer". An empty box is the empty answer.
    """
    if (boxes := _boxed(text)) is not None:
        return ", ".join(boxes)
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    found = None
    for pattern in (_SAYS, _HEADING):
        for match in pattern.finditer(text):
            if found is None or match.end() > found:
                found = match.end()
    if found is None:
        return None
    line = text[found:].lstrip().partition("\n")[0].strip()
    return line or None


def stated_expressions(text: str) -> list[str]:
    r"""Return the possible readings of the mathematical answer of a text; the first reading is the whole.

    If boxes are joined by "and" or "or", the last box alone is a second reading.
    """
    boxes = _boxed(text)
    if boxes is not None:
        return list(dict.fromkeys((", ".join(boxes), boxes[-1])))
    found = stated_expression(text)
    return [] if found is None else [found]


def stated_expression(text: str) -> str | None:
    r"""Return the mathematical answer of a text; None if only its last number can be the answer.

    That is a box, else the formulas (or, without a formula, the few words) of `stated_answer`, else the last
    formula (`$...$`, `\(...\)`, `\[...\]`) of the text if no number follows it. Formulas joined by "and",
    "or" or a comma are one list. An empty box is the empty answer.
    """
    stated = stated_answer(text)
    if stated is not None and _BOX.search(text):
        return stated
    if stated is not None:
        found = _formulas(stated)
        if found:
            return _joined(stated, found[0], found[1:])
        phrase = _SENTENCE_END.split(stated, maxsplit=1)[0].strip().strip("*_")
        if phrase and len(phrase) <= 80 and len(re.findall(r"[A-Za-z]{2,}", phrase)) <= 4:
            return phrase
        return None
    found = _formulas(text)
    if not found or last_number(text[found[-1][1] :]):
        return None
    first = len(found) - 1
    while first and _BETWEEN_BOXES.fullmatch(text[found[first - 1][1] : found[first][0]]):
        first -= 1
    return _joined(text, found[first], found[first + 1 :])


def _joined(text: str, first: _Formula, others: list[_Formula]) -> str:
    """Return a formula joined with those that follow it in the same list."""
    parts, end = [first[2]], first[1]
    for start, stop, formula in others:
        if not _BETWEEN_BOXES.fullmatch(text[end:start]):
            break
        parts.append(formula)
        end = stop
    return ", ".join(parts)


def _formulas(text: str) -> list[_Formula]:
    """Return the formulas of a text; `$5 and then $6` is not one."""
    found: list[_Formula] = []
    place = 0
    while match := _FORMULA.search(text, place):
        formula = next(part for part in match.groups() if part is not None).strip()
        words = re.sub(r"\\(?:text|mbox|mathrm)\s?\{[^{}]*\}|\\[A-Za-z]+", " ", formula)
        if match[0][0] == "$" and re.search(
            r"[A-Za-z]{2,}[\s,]+[A-Za-z]{2,}|[0-9][.,]?\s+[A-Za-z]{2,}", words
        ):
            place = match.start() + 1
            continue
        found.append((match.start(), match.end(), formula))
        place = match.end()
    return found


def stated_number(text: str) -> Number | None:
    """Return the number that a text gives as its answer, or None.

    That is the number at the beginning of `stated_answer`, behind the last `=` of a calculation, else the
    last number outside parentheses, else the last number. A text without digits may have a number in words
    ("twelve").
    """
    stated = stated_answer(text)
    if stated is not None:
        marked = _BOX.search(text) is not None or "####" in text
        if marked:
            return _head_number(_SPACED_MINUS.sub("-", stated), whole=True) or in_words(stated)
        if _HEAD.match(stated):
            return _head_number(_SPACED_MINUS.sub("-", stated), whole=False)
        if (found := in_words(stated)) is not None:
            return found
    return last_number(_ASIDE.sub(" ", text)) or last_number(text) or in_words(text)


def in_words(text: str) -> Number | None:
    """Return the number of a short text that is English number words alone, such as "minus twenty-one"."""
    words = re.findall(r"[a-z]+", text.lower().replace(" and ", " ")) if len(text) < 200 else []
    if not words or len(words) > 12 or re.search(r"[0-9]", text):
        return None
    sign = -1 if words[0] in ("minus", "negative") else 1
    total, part, seen = 0, 0, False
    for word in words[1:] if sign < 0 else words:
        if word in _WORDS:
            part += _WORDS[word]
        elif word == "hundred" and seen:
            part *= 100
        elif word in _SCALES and seen:
            total, part = total + part * _SCALES[word], 0
        else:
            return None
        seen = True
    value = sign * (total + part)
    return next(numbers(str(value))) if seen else None


def _head_number(stated: str, *, whole: bool) -> Number | None:
    """Return the number at the beginning of an answer, or the result of the calculation there.

    whole : the answer is a box, so a list in it is not a number. "7 or 8" never is.
    """
    parts = stated.split("=")
    while len(parts) > 1 and _CALCULATION.fullmatch(parts[0]):
        parts.pop(0)
    found = list(numbers(parts[0]))
    if len(found) > 1 and re.search(r"\bor\b|[,;]|\band\b" if whole else r"\bor\b", parts[0]):
        return None
    return found[0] if found else None


def _boxed(text: str) -> list[str] | None:
    """Return the contents of the last box and the boxes joined to it; "" for a box that is cut or empty."""
    boxes: list[tuple[int, int, str]] = []
    for match in deque(_BOX.finditer(text), maxlen=_MOST_BOXES):
        if match[2]:
            boxes.append((match.start(), match.end(), match[2]))
            continue
        end = _closing(text, match.end())
        if end is not None and (not boxes or match.start() >= boxes[-1][1]):
            boxes.append((match.start(), end + 1, text[match.end() : end].strip()))
    if not boxes:
        return [""] if _BOX.search(text) else None
    parts = [boxes[-1][2]]
    for before, after in pairwise(reversed(boxes)):
        if not _BETWEEN_BOXES.fullmatch(text[after[1] : before[0]]):
            break
        parts.insert(0, after[2])
    return list(dict.fromkeys(parts))


def _closing(text: str, start: int) -> int | None:
    """Return the place of the closing brace of a box, or None if the box is too long or cut."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + _LONGEST_BOX):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
