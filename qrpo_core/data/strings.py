"""Strings that hold conversations: messages written as JSON, and transcripts of turns.

Which form the strings of a data set have is a setting, `prompts.string_format`. Where it is not set, a string
is text, and one that looks like another form is refused with the form's name: a model would otherwise be
trained on the wrapping.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Literal

from qrpo_core.data.messages import Message, is_message, read_messages
from qrpo_core.errors import DataError

StringFormat = Literal["text", "json", "transcript"]

_ROLE = {"Human": "user", "Assistant": "assistant"}
#: The marks before turns, by how a transcript begins: those of Anthropic's HH-RLHF, and those of
#: OpenAssistant-Guanaco.
_MARKS = {
    "Human:": re.compile(r"(?:^|\n\n)(Human|Assistant):"),
    "### Human:": re.compile(r"\s*### (Human|Assistant):"),
}
#: The beginning of a Python literal of messages, as CSV files of tables hold them.
_LITERAL = re.compile(r"\s*\[?\s*\{\s*'(?:role|content|from|value)'\s*:")


def read_string(
    text: str, form: StringFormat | None, source: str, place: str, notes: Counter[str]
) -> str | list[Message]:
    """The messages that a string holds in the given form, or the string itself where it holds none.

    Raises DataError where the form is not set and the string looks like messages.
    """
    if form == "json":
        value = _messages(text)
        return text if value is None else read_messages(value, source, place, notes)
    if form == "transcript":
        return _turns(text) or text.strip()
    if form is None:
        _refuse_other_forms(text, source, place)
    return text


def _refuse_other_forms(text: str, source: str, place: str) -> None:
    found = ""
    if _messages(text) is not None:
        found, form = "messages written as JSON", "json"
    elif "Assistant" in _pieces(text) or text.startswith("\n\nHuman:"):
        found, form = "a transcript of turns 'Human:' and 'Assistant:'", "transcript"
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


def _messages(text: str) -> Any:
    """The message or the list of messages that a string spells as JSON; None if it does not."""
    if not text.lstrip().startswith(("[", "{")) or not ('"role"' in text or '"from"' in text):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    several = isinstance(value, list) and value and all(is_message(item) for item in value)
    return value if several or is_message(value) else None


def _pieces(text: str) -> list[str]:
    """Who speaks and what is said, in turn; none if the text is no transcript."""
    text = text.strip()
    marks = next((marks for beginning, marks in _MARKS.items() if text.startswith(beginning)), None)
    return marks.split(text)[1:] if marks else []


def _turns(text: str) -> list[Message]:
    """The turns of a transcript, without the opening of an answer at its end; none if it is no transcript."""
    pieces = _pieces(text)
    turns = [
        {"role": _ROLE[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns
