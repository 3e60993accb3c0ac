"""Find the numbers in a judge's answer that are meant as its score."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Not a part of a word, a decimal, a date or a larger number with separators; 7.0 is 7.
_NUMBER = r"(?<![\w.,\-])(?<!\bminus )(?P<number>-?\d+)(?:\.0+)?(?![\w\-%]|[.,]\d)"
_INTEGER = re.compile(_NUMBER, re.ASCII)
#: The highest score behind a score, as in 7/10, **7** / 10 or "7 out of 10".
OF_HIGHEST = re.compile(
    r"[\s*_]*(?:/|out of(?: an?(?: possible| maximum| total)(?: of)?)?)[\s*_]*(?P<end>\d+)(?![\w\-]|[.,]\d)",
    re.ASCII | re.IGNORECASE,
)

_MARKS = r"[\s*_#>\"'`$-]*"
_KIND = r"(?:score|rating|rate|grade|mark|verdict|judge?ment)"
_OVERALL = rf"(?:overall|final|total)(?:[ _-]+(?:{_KIND}|answer|assessment))?"
# A statement begins a line, a sentence or a member of an object, and names its number.
_LABEL = (
    r"(?:^|[.!?;,{{(|>\n])"
    + _MARKS
    + r"(?:(?:my|the)[ ]+)?{label}(?:[ ]+I[ ]+(?:would[ ]+)?(?:give|assign|award))?"
    + r"(?:[ ]*\([^()\n]{{0,40}}\))?"
)
_EQUALS = (
    r"[*_\"'`\s]*(?:=>|[:=|]|[\u2013\u2014](?=[ ])|\bis\b|\bwould[ ]be\b)[\s*_\"'`$\[({\\]*(?:boxed\{)?\+?"
)
#: A number alone on its line, with or without the highest score.
_ALONE = _NUMBER + r"(?=[ \t*_]*(?:/[ \t*_]*\d+[ \t*_]*)?(?:\n|\Z))"
#: Forms of statements, the more final first.
_STATED = tuple(
    re.compile(form, re.ASCII | re.IGNORECASE)
    for form in (
        _LABEL.format(label=_OVERALL)
        + _EQUALS
        + _NUMBER
        + rf"|{_LABEL.format(label=_OVERALL)}[ \t*_]*\n[\s*_#]*"
        + _ALONE.replace("<number>", "<below>"),
        _LABEL.format(label=_KIND)
        + _EQUALS
        + _NUMBER
        + rf"|{_LABEL.format(label=_KIND)}[ \t*_]*\n[\s*_#]*"
        + _ALONE.replace("<number>", "<below>")
        + r"|\[\[\s*(?P<double>-?\d+)\s*\]\]|\\boxed\{\s*(?P<boxed>-?\d+)\s*\}"
        + rf"|<(?P<tag>(?:(?:final|overall|total)[_-]?)?{_KIND}|answer)>\s*(?P<tagged>-?\d+)\s*</(?P=tag)>",
    )
)
#: The same labels before any number, whole or not.
_LABELLED = tuple(
    re.compile(
        _LABEL.format(label=label) + _EQUALS + r"(?=[-.]?\s?\d|null\b|none\b|n/a\b)", re.ASCII | re.IGNORECASE
    )
    for label in (_OVERALL, _KIND)
)
#: "I would rate it 7", in a sentence without another number and without conditions.
_SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\w))+")
_GIVES = re.compile(
    r"\b(?:I|we)(?:['\u2019]d|['\u2019]ll|[ ]would|[ ]will)?[ ](?:give|rate|score|grade|award|assign)\b",
    re.IGNORECASE,
)
_DOUBTED = re.compile(
    r"\b(?:if|unless|had|were|not|least|most|more|less|above|below|under|over|between|up to)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
_LINE_ALONE = re.compile(r"(?:^|(?<=\n))[ \t*_#]*" + _ALONE, re.ASCII)


class Unreadable(ValueError):
    """The answer gives no score; the message says why."""


@dataclass(frozen=True)
class Written:
    """The score that an answer states, and its place in the text."""

    value: int
    start: int
    end: int


def stated(text: str, quoted: str, lowest: int, highest: int) -> list[Written]:
    """Return the statements of the most final kind. Raises Unreadable if one of them is not an integer."""
    scale = re.compile(rf"{lowest}\s?(?:-|\u2013|to)\s?{highest}\b")
    for form, labelled in zip(_STATED, _LABELLED, strict=True):
        found = list(form.finditer(text))
        places = {match.start() for match in found}
        if any(
            match.start() not in places and not scale.match(text, match.end())
            for match in labelled.finditer(text)
        ):
            raise Unreadable(f"a score that is no integer is stated in the answer {quoted}")
        if found:
            return [as_written(match, str(match.lastgroup)) for match in found]
    return []


def given(text: str, lowest: int, highest: int) -> list[Written]:
    """Return scores whose place shows that they are meant, in an answer with other numbers.

    In this order: "I would give it 7" in a sentence with no other number; a first or last line that is the
    number alone; "7/10" at the beginning or the end of an answer whose other such fractions are the same.
    """
    if found := [
        _moved(score[0], sentence.start())
        for sentence in _SENTENCE.finditer(text)
        if _GIVES.search(sentence[0])
        and not _DOUBTED.search(sentence[0])
        and len(score := integers(sentence[0], lowest, highest)) == 1
        and len(re.findall(r"\d+", sentence[0][: score[0].start] + sentence[0][score[0].end :])) <= 1
    ]:
        return found
    body = text.strip()
    start = text.find(body)
    alone = [as_written(match, "number") for match in _LINE_ALONE.finditer(text)]
    rest = [score for score in alone if not text[start : score.start].strip(" \t*_#-")]
    rest += [score for score in alone if "\n" not in text[score.end :].rstrip()]
    if rest:
        return rest
    over = [
        score
        for score in (as_written(match, "number") for match in _INTEGER.finditer(text))
        if end_of(text, score, highest) > score.end
    ]
    if not over:
        return []
    first, last = text[start : over[0].start], text[end_of(text, over[-1], highest) :]
    if not first.strip(" \t*_#") or not last.strip(" \t\n.!*_"):
        return over
    return []


def _moved(score: Written, places: int) -> Written:
    return Written(score.value, score.start + places, score.end + places)


def as_written(match: re.Match[str], group: str) -> Written:
    return Written(int(match[group]), match.start(group), match.end(group))


def integers(text: str, lowest: int, highest: int) -> list[Written]:
    """Return all integers of an answer, except the ends of the scale where it is named."""
    scale = rf"(?<![\w.,\-]){lowest}\b[^\d\n]{{0,40}}?(?:\bto\b|\band\b|[-\u2013])[^\d\n]{{0,20}}?{highest}\b"
    text = re.sub(scale, lambda found: " " * len(found[0]), text, flags=re.ASCII)
    found: list[Written] = []
    place = 0
    while match := _INTEGER.search(text, place):
        place = end_of(text, score := as_written(match, "number"), highest)
        found.append(score)
    return found


def end_of(text: str, score: Written, highest: int) -> int:
    """Return the end of a score with its scale: behind "7/10" if `highest` is 10."""
    ending = OF_HIGHEST.match(text, score.end)
    return ending.end() if ending and int(ending["end"]) == highest else score.end
