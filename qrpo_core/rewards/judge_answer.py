"""What a judge's answer says: the number that it wrote, and its expected number over the tokens' chances."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo_core.rewards.base import clip

#: The least probability that has to lie on numbers of the scale, and the most that may lie on tokens of
#: which it is not known which number they begin.
LEAST_MASS, MOST_OPEN = 0.5, 0.01

_WIDEST_ANSWER = 80
# Not a part of a word, a decimal, a date or a larger number with separators.
_INTEGER = re.compile(r"(?<![\w.,\-])-?\d+(?![\w\-]|[.,]\d)", re.ASCII)
#: The scale's end that follows a score, as in 7/10, **7** / 10 or "7 out of 10".
_OF_HIGHEST = re.compile(r"[\s*_]*(?:/|out of)\s*(?P<end>\d+)(?![\w\-]|[.,]\d)", re.ASCII | re.IGNORECASE)


class Unreadable(ValueError):
    """The answer gives no score; the message says why."""


@dataclass(frozen=True)
class Written:
    """The score that an answer states, and where in the text it stands."""

    value: int
    start: int
    end: int


def written(text: str, lowest: int, highest: int, *, cut: bool = False) -> Written:
    """The one integer of an answer.

    The strict rule: an integer on its own (no decimal, no part of a word), "7/10" and "7 out of 10" being
    7 where 10 is `highest`; all integers of the answer have to be the same; it has to be on the scale.

    cut : the answer met its length limit: a number at its very end may be the beginning of another.

    Raises Unreadable.
    """
    found: list[Written] = []
    place = 0
    while match := _INTEGER.search(text, place):
        place = match.end()
        ending = _OF_HIGHEST.match(text, place)
        if ending and int(ending["end"]) == highest:
            place = ending.end()
        found.append(Written(int(match[0]), match.start(), match.end()))
    quoted = repr(clip(text, _WIDEST_ANSWER))
    if not found:
        raise Unreadable(f"no integer in the answer {quoted}")
    if len({score.value for score in found}) > 1:
        raise Unreadable(f"several numbers in the answer {quoted}")
    score = found[0]
    if not lowest <= score.value <= highest:
        raise Unreadable(f"{score.value} is outside the scale {lowest} to {highest}; the answer is {quoted}")
    if cut and score.end == len(text):
        raise Unreadable(f"the answer {quoted} is cut inside or right behind its number; raise max_tokens")
    return score


def expected(
    text: str, tokens: Sequence[Mapping[str, Any]], score: Written, lowest: int, highest: int
) -> float:
    """The mean of the scale's numbers, weighted by the probabilities at the place of the written score.

    As in G-Eval (Liu et al. 2023), with the weights renormalised over the numbers that are seen, and with
    numbers of several tokens: a token that begins a longer number of the scale ("1" of 1 and 10) is

    - that shorter number where the tokens show that such numbers are one token here ("10" among them);
    - on the written path, split by the probabilities of the next token (another digit, or anything else);
    - otherwise open.

    tokens : `choices[0].logprobs.content` of the reply: token, logprob, bytes, top_logprobs.

    Raises Unreadable where the tokens do not spell the answer, where less than `LEAST_MASS` lies on the
    scale, and where more than `MOST_OPEN` is open (then the error could be that share of the scale).
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
    """Probability by number, and what is open."""

    def __init__(self, names: set[str], whole: bool) -> None:
        self._names, self._whole = names, whole
        self.weights: dict[int, float] = {}
        self.open = 0.0

    def longer(self, digits: str) -> bool:
        return any(name != digits and name.startswith(digits) for name in self._names)

    def add(self, digits: str, chance: float) -> None:
        """Count a token that was not written; what is no number of the scale counts nowhere."""
        if self.longer(digits) and not (self._whole and digits in self._names):
            self.open += chance
        else:
            self.end(digits, chance)

    def end(self, digits: str, chance: float) -> None:
        """Count a number that ends here."""
        if str(int(digits)) in self._names:
            self.weights[int(digits)] = self.weights.get(int(digits), 0.0) + chance

    def split(self, digits: str, chance: float, following: Mapping[str, Any] | None) -> float:
        """What is left for the written number when the next token could have made it longer."""
        if following is None:  # the end token's probability is not told: nothing can be said
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
    """The first and last token of the written score."""
    pieces = [_bytes(token) for token in tokens]
    spelled = b"".join(pieces)
    answer = text.encode()
    offset = spelled.find(answer)  # an end token may follow, white space may be stripped from the text
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
    """Probability by digits at one place: tokens that differ in white space before the digits are added."""
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
    """The digits that a token is; white space may stand before them, but not inside a number."""
    digits = name if continued else name.lstrip()
    return digits if digits.isascii() and digits.isdigit() else None
