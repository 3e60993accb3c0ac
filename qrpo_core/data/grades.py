"""Grades that a data set gives its completions, and where in a row they stand."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from qrpo_core.data.config import PromptsConfig
from qrpo_core.data.fields import ABSENT, kind, lookup, nearest
from qrpo_core.errors import DataError

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": 1.0, "false": 0.0}
#: What tables write where nobody gave a grade.
_NO_GRADE = ("", "n/a", "na", "null", "none")


class Grade(NamedTuple):
    """One grade that a completion has.

    name : its field, without the sign.
    weight : what it is multiplied by; -1 where less is better.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def signed(cls, name: str) -> Grade:
        """A name as the config writes it: with a minus (or a plus) before it, or without."""
        return cls(name.lstrip("+-"), -1.0 if name.startswith("-") else 1.0)


def grades_of(config: PromptsConfig) -> list[tuple[Grade, ...]]:
    """The grades of each of `completion_fields`, in their order; empty tuples where none are asked for."""
    count = len(config.completion_fields)
    if config.completion_reward_fields:
        return [(Grade.signed(name),) for name in config.completion_reward_fields]
    if config.completion_reward_weights:
        return [tuple(Grade(*item) for item in config.completion_reward_weights.items())] * count
    name = config.completion_reward_field
    return [() if name is None else (Grade.signed(name),)] * count


class Place(NamedTuple):
    """Where a completion stands in its row.

    row : the whole row. source : the row's place, for people. name : the completion's place in the row.
    item, of : its number in a list of so many completions; None, 1 where its field holds one alone.
    shared : whether the completions of other fields have the same grades, which no column beside can serve.
    """

    row: Mapping[str, Any]
    source: str
    name: str
    item: int | None = None
    of: int = 1
    shared: bool = False


def read_reward(value: Any, grades: Sequence[Grade], place: Place) -> float | None:
    """The weighted sum of a completion's grades; None where one of them is null or says that it is none.

    A grade stands under its name in the completion's own mapping, else in the row beside it: one value for
    a completion alone, a list in step with a list of completions.
    Raises DataError where it is absent, does not fit, or is no finite number.
    """
    found = [(grade.weight, read_number(*_value(value, grade.name, place), place.source)) for grade in grades]
    if any(number is None for _, number in found):
        return None
    return math.fsum(weight * (number or 0.0) for weight, number in found) + 0.0  # no -0.0


def read_number(value: Any, place: str, source: str) -> float | None:
    """A number as JSON, a table or a text has it; None for null and for texts that say there is none."""
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
    return number


def _value(value: Any, name: str, place: Place) -> tuple[Any, str]:
    """(the grade as the row gives it, where it stands)."""
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
