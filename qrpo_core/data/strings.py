"""Strings that hold conversations: messages written as JSON, and transcripts of turns.

`prompts.string_format` sets the form of a data set's strings. Without it strings are text, and a string that
looks like another form is refused with the name of that form: else a model would be trained on the wrapping.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Literal

from qrpo_core.common.errors import DataError
from qrpo_core.data.messages import Message, is_message, read_messages

StringFormat = Literal["text", "json", "transcript"]

_ROLE = {"human": "user", "user": "user", "assistant": "assistant"}
#: The marks before turns, by the beginning of a transcript: Anthropic's HH-RLHF, OpenAssistant-Guanaco, and
#: two other common forms.
_MARKS = {
    "Human:": re.compile(r"(?:^|\n\n)(Human|Assistant):"),
    "### Human:": re.compile(r"\s*### (Human|Assistant):"),
    "User:": re.compile(r"(?:^|\n+)(User|Assistant):"),
    "USER:": re.compile(r"(?:^|\s+)(USER|ASSISTANT):"),
}
#: The beginning of a Python literal of messages, which CSV files often hold.
_LITERAL = re.compile(r"\s*(?:array\()?\[?\s*\{\s*'(?:role|content|from|value)'\s*:")


def read_string(
    text: str,
    form: StringFormat | None,
    source: str,
    place: str,
    notes: Counter[str],
    *,
    is_prompt: bool = False,
) -> str | list[Message]:
    """Return the messages in a string of the given form, or the string itself if it holds none.

    A JSON list of one string gives that string; a list of several raises DataError. If the form is None, a
    string that looks like messages raises DataError, and a prompt also if it looks like a list.
    """
    if form == "json":
        return _from_json(text, source, place, notes)
    if form == "transcript":
        return _turns(text) or text
    if form is None:
        _refuse_other_forms(text, source, place, is_prompt)
    return text


def _from_json(text: str, source: str, place: str, notes: Counter[str]) -> str | list[Message]:
    value = _messages(text)
    if value is not None:
        return read_messages(value, source, place, notes)
    value = _strings(text)
    if value is None:
        return text
    if len(value) != 1:
        raise DataError(
            f"{place} is {len(value)} strings written as a JSON list",
            where=source,
            remedy="messages say whose turn each is; give those, or remove the row",
        )
    return str(value[0])


def _refuse_other_forms(text: str, source: str, place: str, is_prompt: bool) -> None:
    found = ""
    if _messages(text) is not None:
        found, form = "messages written as JSON", "json"
    elif is_prompt and _strings(text):
        found, form = "strings written as a JSON list", "json"
    elif _is_wrapped(text):
        found, form = f"a transcript of turns '{_pieces(text)[0]}:' and 'Assistant:'", "transcript"
    elif _LITERAL.match(text):
        raise DataError(
            f"{place} is a string that holds messages as a Python literal",
            where=source,
            remedy="save them as lists, in JSON or Parquet, or set prompts.string_format to text",
        )
    if found:
        raise DataError(
            f"{place} is a string that holds {found}",
            where=source,
            remedy=f"set prompts.string_format to {form}, or to text if the model shall read it as it stands",
        )


def _is_wrapped(text: str) -> bool:
    """Whether a text is a transcript made by a program. People write `User: ...` in their own prompts too."""
    answered = {"Assistant", "ASSISTANT"} & set(_pieces(text)[::2])
    return text.startswith("\n\nHuman:") or (bool(answered) and not text.lstrip().startswith("User:"))


def _messages(text: str) -> Any:
    """Return the message or list of messages that a string spells as JSON, or None."""
    if "role" not in text and "from" not in text:
        return None
    value = _json(text)
    value = _json(value) if isinstance(value, str) else value  # written twice
    several = isinstance(value, list) and value and all(is_message(item) for item in value)
    return value if several or is_message(value) else None


def _strings(text: str) -> list[str] | None:
    """Return the list of strings that a string spells as JSON, or None."""
    value = _json(text) if text.lstrip().startswith("[") else None
    is_list = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return value if is_list else None


def _json(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{", '"')):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _pieces(text: str) -> list[str]:
    """Return speaker and text of each turn, alternating; empty if the text is no transcript."""
    text = text.strip()
    marks = next((marks for beginning, marks in _MARKS.items() if text.startswith(beginning)), None)
    return marks.split(text)[1:] if marks else []


def _turns(text: str) -> list[Message]:
    """Return the turns of a transcript, without an empty answer at its end; empty for other texts."""
    pieces = _pieces(text)
    turns = [
        {"role": _ROLE[who.lower()], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns
