"""Fields of a row by the names in the config: a key, or a path of keys joined by dots."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from qrpo_core.common.errors import DataError

#: Returned by `lookup` if a row has no such field. null is a value.
ABSENT: Any = object()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the nearest known name, or all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"known here: {', '.join(names[:20])}{more}"


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """Return the value under a key or under keys joined by dots; ABSENT if there is none.

    A key that contains the dots itself comes first. A path below null gives null. A path below a list of
    objects gives the list of the objects' values.
    """
    if name in row:
        return row[name]
    key, _, rest = name.partition(".")
    return _below(row[key], rest) if rest and key in row else ABSENT


def _below(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        found = [_below(item, name) for item in value]
        return ABSENT if any(item is ABSENT for item in found) else found
    return lookup(value, name) if isinstance(value, Mapping) else ABSENT


def field(row: Mapping[str, Any], name: str, source: str) -> Any:
    """Return a field that a row must have. Raises DataError with the nearest name if it is absent."""
    value = lookup(row, name)
    if value is ABSENT:
        raise DataError(f"no field {name!r}", where=source, remedy=nearest(name, _names(row, name)))
    return value


def column(name: str, columns: Iterable[str]) -> str:
    """Return the column of a table that holds a field."""
    return name if name in columns else name.split(".")[0]


def kind(value: Any) -> str:
    """Return the type of a value in the words of JSON, for messages."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    names = {list: "a list", str: "a string", bool: "true or false", int: "an integer", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _names(row: Mapping[str, Any], name: str) -> list[str]:
    """Return names that could have been meant: keys, and for a path the keys one level down."""
    if "." not in name:
        return list(row)
    inner = [f"{key}.{below}" for key, value in row.items() if isinstance(value, Mapping) for below in value]
    return [*row, *inner]
