"""Conversations of data sets, brought to one form.

A conversation is a list of messages or one message. A message has role and content, or (ShareGPT) from and
value. Its content is a string or a list of text parts. Every problem is a DataError with the row's place and
a remedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qrpo_core.common.errors import DataError
from qrpo_core.data.fields import kind, nearest

Message = dict[str, str]

ROLES = ("system", "user", "assistant")

#: Keys of a message that change what the model reads. Dropping them would change the conversation.
_CONTENT_KEYS = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "tools"), "conversations with tools"),
    **dict.fromkeys(("image", "images", "image_url", "audio", "audios", "video", "videos"), "media"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "thoughts outside the content"),
}

#: Roles of ShareGPT's speakers.
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

#: Spellings of other formats, for the remedy only.
_OTHER_ROLES = {
    **_SHAREGPT,
    "model": "assistant",
    "developer": "system",
    "prompter": "user",
    "tool": "",
    "function": "",
    "observation": "",
    "function_call": "",
}


def is_message(value: Any) -> bool:
    """Whether a value has the keys of a message."""
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or _is_sharegpt(value))


def is_answer(value: Any) -> bool:
    """Whether a value is a message of the assistant."""
    speaker = value.get("role", value.get("from")) if is_message(value) else None
    return isinstance(speaker, str) and _SHAREGPT.get(speaker, speaker) == "assistant"


def read_messages(value: Any, source: str, name: str, notes: Counter[str]) -> list[Message]:
    """Return the messages of a list, or of one message. `name` names the value of the row in errors.

    A message keeps its role and content. Other keys with a value are counted in `notes` as
    ignored_message_keys, or refused if the conversation would mean something else without them.
    """
    if isinstance(value, Mapping):
        return [_message(value, source, name, notes)]
    messages = []
    for number, message in enumerate(value):
        place = f"{name}, message {number},"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{place} is {kind(message)}", where=source, remedy="a message has role and content"
            )
        messages.append(_message(message, source, place, notes))
    return messages


def _is_sharegpt(message: Mapping[str, Any]) -> bool:
    return "role" not in message and {"from", "value"} <= message.keys()


def _message(message: Mapping[str, Any], source: str, place: str, notes: Counter[str]) -> Message:
    if _is_sharegpt(message):
        others = {key: value for key, value in message.items() if key not in ("from", "value", "content")}
        speaker = message["from"]
        message = others | {"role": _SHAREGPT.get(speaker, speaker), "content": message["value"]}
    for key in ("role", "content"):
        if key not in message:
            raise DataError(
                f"{place} has no {key}", where=source, remedy=f"its keys are {', '.join(message) or 'none'}"
            )
    for key in message:
        if key in ("role", "content") or message[key] is None:
            continue
        if key in _CONTENT_KEYS and message[key]:
            raise DataError(
                f"{place} has {key}", where=source, remedy=f"{_CONTENT_KEYS[key]} are not covered"
            )
        notes["ignored_message_keys"] += 1
    return {"role": _role(message["role"], source, place), "content": _content(message, source, place)}


def _role(role: Any, source: str, place: str) -> str:
    if role in ROLES:
        return str(role)
    meant = _OTHER_ROLES.get(role) if isinstance(role, str) else None
    if meant == "":
        remedy = "conversations with tools are not covered"
    else:
        remedy = f"did you mean {meant!r}?" if meant else nearest(str(role), ROLES)
    raise DataError(f"unknown role {role!r} in {place.rstrip(',')}", where=source, remedy=remedy)


def _content(message: Mapping[str, Any], source: str, place: str) -> str:
    """Return the content: a string, or the joined texts of its parts, as chat templates write them."""
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"content of {place} is {kind(content)}",
            where=source,
            remedy="it must be a string or a list of text parts",
        )
    texts = []
    for number, part in enumerate(content):
        of = part if isinstance(part, Mapping) else {}
        if of.get("type") != "text" or not isinstance(of.get("text"), str):
            form = f"of type {of['type']!r}" if "type" in of else kind(part)
            raise DataError(
                f"part {number} of the content of {place} is {form}",
                where=source,
                remedy='only text is covered: parts are {"type": "text", "text": ...}',
            )
        texts.append(of["text"])
    return "".join(texts)
