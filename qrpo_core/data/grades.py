"""The grades that a data set gives its completions, and their places in a row."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import LARGEST_REWARD
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.fields import ABSENT, kind, lookup, nearest

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": 1.0, "false": 0.0}
#: Texts that mean: no grade.
_NO_GRADE = ("", "n/a", "na", "null", "none")


class Grade(NamedTuple):
    """One grade of a completion.

    name : its field, without the sign.
    weight : its factor; -1 where less is better.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def signed(cls, name: str) -> Grade:
        """A name as the config writes it: with a minus (or a plus) before it, or without."""
        return cls(name.lstrip("+-"), -1.0 if name.startswith("-") else 1.0)


def grades_of(config: PromptsConfig) -> list[tuple[Grade, ...]]:
    """Return the grades of each of `completion_fields`, in their order; empty tuples if there are none."""
    count = len(config.completion_fields)
    if config.completion_reward_fields:
        return [(Grade.signed(name),) for name in config.completion_reward_fields]
    if config.completion_reward_weights:
        return [tuple(Grade(*item) for item in config.completion_reward_weights.items())] * count
    name = config.completion_reward_field
    return [() if name is None else (Grade.signed(name),)] * count


class Place(NamedTuple):
    """The place of a completion in its row.

    row : the whole row.
    source : place of the row, for messages. name : place of the completion in the row, for messages.
    item, of : its number in a list of `of` completions; None and 1 if its field holds one completion.
    shared : whether completions of several fields share the names of grades; a column beside cannot grade
        them.
    """

    row: Mapping[str, Any]
    source: str
    name: str
    item: int | None = None
    of: int = 1
    shared: bool = False


def read_reward(value: Any, grades: Sequence[Grade], place: Place) -> float | None:
    """Return the weighted sum of a completion's grades; None if one of them is null or a text for none.

    A grade is looked up in the completion's own mapping, then in the row: one value for one completion, or a
    list of the same length as the list of completions.
    Raises DataError if a grade is absent, has the wrong length, or is not a finite number.
    """
    found = [(grade.weight, read_number(*_value(value, grade.name, place), place.source)) for grade in grades]
    if any(number is None for _, number in found):
        return None
    return math.fsum(weight * (number or 0.0) for weight, number in found) + 0.0  # no -0.0


def read_number(value: Any, place: str, source: str) -> float | None:
    """Return the number in a value of JSON, of a table or of a text; None for null and texts for none."""
    if value is None:
        return None
    remedy = "a reward is a finite number, true or false; give null where there is none"
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _NO_GRADE:
            return None
        value = _WORDS.get(text, value)
        if isinstance(value, str) and _NUMBER.fullmatch(text):
            value = float(text)
    if not isinstance(value, bool | int | float | Decimal):
        raise DataError(f"{place} is {reprlib.repr(value)}, not a number", where=source, remedy=remedy)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{place} is {number}", where=source, remedy=remedy)
    if abs(number) > LARGEST_REWARD:
        raise DataError(
            f"{place} is {number:g}, which is beyond {LARGEST_REWARD:g}", where=source, remedy=remedy
        )
    return number


def _value(value: Any, name: str, place: Place) -> tuple[Any, str]:
    """Return (the grade as the row gives it, its place for messages)."""
    if isinstance(value, Mapping):
        own = lookup(value, name)
        if own is not ABSENT:
            return own, f"{name!r} of {place.name}"
    beside = lookup(place.row, name)
    if beside is ABSENT:
        raise _absent(value, name, place)
    if place.shared:
        raise DataError(
            f"column {name!r} would grade the completions of all fields alike",
            where=place.source,
            remedy="name a column for each by prompts.completion_reward_fields",
        )
    if place.item is None:
        return beside, repr(name)
    if not isinstance(beside, list) or len(beside) != place.of:
        held = f"a list of {len(beside)}" if isinstance(beside, list) else kind(beside)
        raise DataError(
            f"{place.name} is one of {place.of} completions, and their grades {name!r} are {held}",
            where=place.source,
            remedy="give a list with one grade for each",
        )
    return beside[place.item], f"item {place.item} of {name!r}"


def _absent(value: Any, name: str, place: Place) -> DataError:
    if isinstance(value, Mapping):
        return DataError(
            f"{place.name} has no {name!r}, nor has the row a column of that name",
            where=place.source,
            remedy=nearest(name, [*value, *place.row]),
        )
    return DataError(
        f"{place.name} is {kind(value)}, and the row has no column {name!r} with its grade",
        where=place.source,
        remedy=nearest(name, place.row),
    )
