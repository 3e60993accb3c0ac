"""Conversations as data sets hold them: lists of messages with role and content, and what is refused.

Every problem is a DataError with the row's place and a remedy.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qrpo_core.errors import DataError

Message = dict[str, str]

ROLES = ("system", "user", "assistant")

#: Keys of a message that change what the model reads; without them it would be another conversation.
_CONTENT_KEYS = ("tool_calls", "tool_call_id", "function_call")

#: Spellings of other formats, for the remedy only.
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_OTHER_KEYS = {"from": "role", "value": "content"}


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"known here: {', '.join(names[:20])}{more}"


def field(row: Mapping[str, Any], name: str, source: str) -> Any:
    """The value of a field that a row must have; DataError with the nearest name where it is absent."""
    try:
        return row[name]
    except KeyError:
        raise DataError(f"no field {name!r}", where=source, remedy=nearest(name, row)) from None


def read_messages(value: list[Any], source: str, name: str, notes: Counter[str]) -> list[Message]:
    """Check a list of messages; `name` says in errors which value of the row it is.

    A message keeps role and content alone; other keys that hold something are counted in `notes` as
    ignored_message_keys, or refused where the conversation means something else without them.
    """
    messages = []
    for number, message in enumerate(value):
        place = f"{name}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{place}, is {kind(message)}", where=source, remedy="a message has role and content"
            )
        messages.append(_message(message, source, place, notes))
    return messages


def _message(message: Mapping[str, Any], source: str, place: str, notes: Counter[str]) -> Message:
    for key in ("role", "content"):
        if key not in message:
            other = next(
                (name for name, means in _OTHER_KEYS.items() if means == key and name in message), ""
            )
            remedy = (
                f"rename {other!r} to {key!r}" if other else f"its keys are {', '.join(message) or 'none'}"
            )
            raise DataError(f"{place}, has no {key}", where=source, remedy=remedy)
        if not isinstance(message[key], str):
            raise DataError(
                f"{key} of {place}, is {kind(message[key])}", where=source, remedy="it must be a string"
            )
    role = message["role"]
    if role not in ROLES:
        meant = _OTHER_ROLES.get(role)
        remedy = f"did you mean {meant!r}?" if meant else nearest(role, ROLES)
        raise DataError(f"unknown role {role!r} in {place}", where=source, remedy=remedy)
    for key in message:
        if key in ("role", "content") or message[key] is None:
            continue
        if key in _CONTENT_KEYS and message[key]:
            raise DataError(
                f"{place}, has {key}", where=source, remedy="conversations with tools are not covered"
            )
        notes["ignored_message_keys"] += 1
    return {"role": role, "content": message["content"]}


def kind(value: Any) -> str:
    """What a value is, in the words of JSON, for messages."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}")
