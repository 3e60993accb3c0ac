"""Read the score in a judge's answer: the written number, or its expectation over token probabilities."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qrpo_core.rewards.base import clip
from qrpo_core.rewards.judge.statements import (
    OF_HIGHEST,
    Unreadable,
    Written,
    end_of,
    given,
    integers,
    stated,
)

#: Least probability on numbers of the scale, and most probability on tokens that may begin several of them.
LEAST_MASS, MOST_OPEN = 0.5, 0.01

_WIDEST_ANSWER = 80
#: Text behind a number that shows, in a cut answer, that the number is complete.
_COMPLETE = re.compile(r"[ \t*_]*(?:\n|[.,;!?][\s\"]|[\"'`\]})]|</)")
_HEDGED = re.compile(r"[\s*_]*(?:or|to|and|[-\u2013~])[\s*_]*\d", re.IGNORECASE)
#: The end and the beginning of a judge's own thinking.
_THOUGHT = re.compile(r"</(?:think|thinking|reasoning|thought)>|\[/THINK\]", re.IGNORECASE)
_THINKS = re.compile(r"<(?:think|thinking|reasoning|thought)>|\[THINK\]", re.IGNORECASE)


def written(
    text: str, lowest: int, highest: int, *, cut: bool = False, pattern: str | None = None
) -> Written:
    """Return the score that an answer states behind the judge's own thinking. Raises Unreadable.

    The score is, in this order: a statement ("Overall: 7", else "Score: 7", [[7]], \\boxed{7},
    <score>7</score>), where all statements of one kind must agree; a number whose place shows that it is
    meant ("I would give it 7", a first or last line that is the number alone, "7/10" at the end); the only
    integer of the answer, where the scale itself ("from 1 to 9") does not count. An integer stands alone: 7.0
    is 7, but 7.5 and 7th are none. "7/10" and "7 out of 10" are 7 if `highest` is 10. The score must be on
    the scale.

    cut : the answer met its length limit; then only a complete statement counts.
    pattern : regular expression that finds the score instead: the group `score`, the first group, or all of
        its last match.
    """
    quoted = repr(clip(text, _WIDEST_ANSWER))
    plain = _without_thinking(_with_ascii_digits(text))
    scores = _matched(plain, pattern) if pattern is not None else stated(plain, quoted, lowest, highest)
    if not scores and pattern is None and not cut:
        scores = given(plain, lowest, highest)
    if cut:
        scores = [score for score in scores if _COMPLETE.match(plain, end_of(plain, score, highest))]
        if not scores:
            raise Unreadable(f"the answer {quoted} is cut before it states a score; raise max_tokens")
    if not scores and pattern is None:
        scores = integers(plain, lowest, highest)
    if not scores:
        raise Unreadable(
            f"no {'integer' if pattern is None else 'match of the pattern'} in the answer {quoted}"
        )
    if len({score.value for score in scores}) > 1:
        raise Unreadable(f"several numbers in the answer {quoted}")
    score = scores[0]
    if not lowest <= score.value <= highest:
        raise Unreadable(f"{score.value} is outside the scale {lowest} to {highest}; the answer is {quoted}")
    end = OF_HIGHEST.match(plain, score.end)
    if (end and int(end["end"]) != highest) or (pattern is None and _HEDGED.match(plain, score.end)):
        raise Unreadable(f"several numbers in the answer {quoted}")
    return score


def _matched(text: str, pattern: str) -> list[Written]:
    """Return the last match of a pattern, as a list. Raises Unreadable if it is not an integer."""
    found = list(re.finditer(pattern, text))[-1:]
    if not found:
        return []
    group = "score" if "score" in found[0].groupdict() else min(1, found[0].re.groups)
    if not re.fullmatch(r"\s*-?[0-9]+(?:\.0+)?\s*", found[0][group] or ""):
        raise Unreadable(f"the pattern finds {clip(str(found[0][group]), 80)!r}, which is no integer")
    number = re.search(r"-?[0-9]+", found[0][group])
    assert number is not None
    start = found[0].start(group) + number.start()
    return [Written(int(number[0]), start, start + len(number[0]))]


def _with_ascii_digits(text: str) -> str:
    """Return the text with all decimal digits as 0 to 9 and minus signs as "-", at the same places."""
    if text.isascii():
        return text
    text = text.replace("\uff0f", "/")
    text = re.sub(r"[\u2212\ufe63\uff0d]|(?<![\d\w])\u2013(?=\d)", "-", text)
    return re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)


def _without_thinking(text: str) -> str:
    """Return the text with the judge's thinking blanked, so that places stay.

    Raises Unreadable for thinking without an end.
    """
    end = max((mark.end() for mark in _THOUGHT.finditer(text)), default=0)
    if _THINKS.search(text, end):
        raise Unreadable(
            f"the judge's thinking does not end: {clip(text, _WIDEST_ANSWER)!r}; raise max_tokens"
        )
    return " " * end + text[end:]


def expected(
    text: str, tokens: Sequence[Mapping[str, Any]], score: Written, lowest: int, highest: int
) -> float:
    """Return the mean of the scale's numbers, weighted by their probabilities at the written score's place.

    This is G-Eval (Liu et al. 2023) with weights renormalised over the numbers seen. It also reads numbers of
    several tokens. A token that begins a longer number of the scale ("1" of 1 and 10) counts

    - as the shorter number if the alternatives show that the longer one is a single token ("10" among them);
    - on the written path, as both, split by the probabilities of the next token;
    - otherwise as open.

    tokens : `choices[0].logprobs.content` of the reply: token, logprob, bytes, top_logprobs.

    Raises Unreadable if the tokens do not spell the answer, if the scale has less probability than
    `LEAST_MASS`, or if more than `MOST_OPEN` is open (the error could be that fraction of the scale).
    """
    first, last = _span(text, tokens, score)
    names = {str(number) for number in range(lowest, highest + 1)}
    whole = any(len(name) > 1 and name in names for name in _chances(tokens[first]))
    tally = _Tally(names, whole)
    prefix, reach = "", 1.0
    for place in range(first, last + 1):
        chances = _chances(tokens[place], continued=place > first)
        chosen = _digits(str(tokens[place]["token"]), continued=place > first)
        if chosen is None:
            raise Unreadable(f"the score shares its token {tokens[place]['token']!r} with other text")
        for digits, chance in chances.items():
            if digits != chosen:
                tally.add(prefix + digits, reach * chance)
        if place > first:
            tally.end(prefix, reach * max(0.0, 1.0 - math.fsum(chances.values())))
        prefix, reach = prefix + chosen, reach * chances[chosen]
    if tally.longer(prefix) and not whole:
        following = tokens[last + 1] if last + 1 < len(tokens) else None
        reach = tally.split(prefix, reach, following)
    tally.end(prefix, reach)
    return tally.mean()


class _Tally:
    """Probability by number, and the open probability."""

    def __init__(self, names: set[str], whole: bool) -> None:
        self._names, self._whole = names, whole
        self.weights: dict[int, float] = {}
        self.open = 0.0

    def longer(self, digits: str) -> bool:
        return any(name != digits and name.startswith(digits) for name in self._names)

    def add(self, digits: str, chance: float) -> None:
        """Count a token that was not written. Numbers outside the scale are ignored."""
        if self.longer(digits) and not (self._whole and digits in self._names):
            self.open += chance
        else:
            self.end(digits, chance)

    def end(self, digits: str, chance: float) -> None:
        """Count a number that ends here."""
        if str(int(digits)) in self._names:
            self.weights[int(digits)] = self.weights.get(int(digits), 0.0) + chance

    def split(self, digits: str, chance: float, following: Mapping[str, Any] | None) -> float:
        """Return the rest for the written number after the next token's chances to make it longer."""
        if following is None:  # the end token's probability is unknown
            self.open += chance
            return 0.0
        going_on = _chances(following, continued=True)
        for more, share in going_on.items():
            self.add(digits + more, chance * share)
        return chance * max(0.0, 1.0 - math.fsum(going_on.values()))

    def mean(self) -> float:
        mass = math.fsum(self.weights.values())
        if self.open > MOST_OPEN:
            raise Unreadable(
                f"probability {self.open:.3f} is on tokens that begin several numbers of the scale; use "
                "numbers of one digit (1 to 9), or expected: false"
            )
        if mass < LEAST_MASS:
            raise Unreadable(f"only probability {mass:.3f} is on numbers of the scale")
        return math.fsum(number * weight for number, weight in self.weights.items()) / mass


def _span(text: str, tokens: Sequence[Mapping[str, Any]], score: Written) -> tuple[int, int]:
    """Return the first and last token of the written score."""
    pieces = [_bytes(token) for token in tokens]
    spelled = b"".join(pieces)
    answer = text.encode()
    # An end token may follow, white space may be stripped, thinking that is no part of the text may precede.
    offset = spelled.rfind(answer)
    if offset < 0:
        raise Unreadable("the tokens of the log-probabilities do not spell the answer")
    start = offset + len(text[: score.start].encode())
    end = offset + len(text[: score.end].encode())
    places, at = [], 0
    for place, piece in enumerate(pieces):
        if at < end and at + len(piece) > start:
            places.append(place)
        at += len(piece)
    return places[0], places[-1]


def _bytes(token: Mapping[str, Any]) -> bytes:
    found = token.get("bytes")
    return bytes(found) if found is not None else str(token["token"]).encode()


def _chances(token: Mapping[str, Any], *, continued: bool = False) -> dict[str, float]:
    """Return the probability by digits at one place, summed over tokens with other leading white space."""
    seen: dict[str, float] = {}
    for entry in [token, *token.get("top_logprobs", ())]:
        seen[str(entry["token"])] = math.exp(min(0.0, float(entry["logprob"])))
    found: dict[str, float] = {}
    for name, chance in seen.items():
        digits = _digits(name, continued=continued)
        if digits is not None:
            found[digits] = found.get(digits, 0.0) + chance
    return found


def _digits(name: str, *, continued: bool) -> str | None:
    """Return the digits of a token, or None. White space may precede them, but not inside a number."""
    digits = _with_ascii_digits(name if continued else name.lstrip())
    return digits if digits.isascii() and digits.isdigit() else None
