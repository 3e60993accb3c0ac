"""One row of a prompt source: what a prompt, a reference and a pair may look like, and what is refused.

Every problem is a DataError with the row's place (file and line, data set and index) and a remedy.
What is legal but set aside (an extra key of a message, say) is counted in `notes`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qrpo_core.config import PromptsConfig
from qrpo_core.errors import DataError

Message = dict[str, str]

ROLES = ("system", "user", "assistant")

#: Keys of a message that change what the model reads; without them it would be another conversation.
_CONTENT_KEYS = ("tool_calls", "tool_call_id", "function_call")

#: Spellings of other formats, for the remedy only.
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_OTHER_KEYS = {"from": "role", "value": "content"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt as a source gives it.

    messages : the conversation, ending with a user turn.
    source : where it stands, for people.
    reference : what a verifier checks against, any JSON value; None for none.
    pair : (chosen, rejected) completions, or None.
    """

    messages: list[Message]
    source: str
    reference: Any = None
    pair: tuple[str, str] | None = None


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"known here: {', '.join(names[:20])}{more}"


def parse_row(row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]) -> Row:
    """Read one mapping of a file or a hub data set by the field names of the config.

    Raises DataError at `source` for a missing field, a prompt of the wrong shape, or a pair that does
    not answer the prompt. `notes` counts rows without reference or pair where a field for them is named.
    """
    reference = None
    if config.reference_field is not None:
        reference = _field(row, config.reference_field, source)
        notes["without_reference"] += reference is None
    sides = _sides(row, source, config, notes)
    prefix = _shared_prefix(sides, source, config)
    given = row.get(config.prompt_field)
    if given is None and prefix and "prompt_field" not in config.model_fields_set:
        messages = prefix
    else:
        given = _field(row, config.prompt_field, source)
        messages = _prompt(given, source, config.prompt_field, notes)
        if prefix and prefix != messages:
            # A prompt string states the user turn alone; the conversation may add the system turn to it.
            if not isinstance(given, str) or [m for m in prefix if m["role"] != "system"] != messages:
                raise DataError(
                    f"{config.chosen_field!r} is a conversation that does not start with the prompt",
                    where=source,
                    remedy=f"the turns before the last one must be those of {config.prompt_field!r}",
                )
            messages = prefix
    check_prompt(messages, source, config.prompt_field)
    pair = (sides[0][1], sides[1][1]) if sides else None
    if pair:
        notes["empty_completions"] += sum(not text for text in pair)
    return Row(messages, source, reference, pair)


def check_prompt(messages: list[Message], source: str, field: str) -> None:
    """Refuse a prompt that nobody can answer: no turns, an answer as the last turn, nothing asked."""
    if not messages:
        raise DataError(
            "the prompt has no messages", where=source, remedy=f"fill {field!r} or remove the row"
        )
    last = messages[-1]
    if last["role"] != "user":
        raise DataError(
            f"the prompt in {field!r} ends with a turn of role {last['role']!r}",
            where=source,
            remedy="a prompt ends with a user turn; name conversations with their answer by "
            "prompts.chosen_field and prompts.rejected_field, or cut the last turn",
        )
    if not last["content"].strip():
        raise DataError("the prompt is empty", where=source, remedy=f"fill {field!r} or remove the row")


def check_columns(columns: Iterable[str], config: PromptsConfig, where: str) -> list[str]:
    """The columns to read of a table that has `columns`; a named one that is absent is a DataError.

    The prompt may be absent where conversations in the pair hold it and its name was not set.
    """
    known = list(columns)
    wanted = [config.prompt_field, config.reference_field, config.chosen_field, config.rejected_field]
    optional = config.chosen_field is not None and "prompt_field" not in config.model_fields_set
    found = []
    for name in wanted:
        if name in known:
            found.append(name)
        elif name is not None and not (optional and name == config.prompt_field):
            raise DataError(f"no column {name!r}", where=where, remedy=nearest(name, known))
    return found


def _field(row: Mapping[str, Any], name: str, source: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise DataError(f"no field {name!r}", where=source, remedy=nearest(name, row)) from None


def _prompt(value: Any, source: str, field: str, notes: Counter[str]) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list):
        return _messages(value, source, field, notes)
    raise DataError(
        f"{field!r} is {_kind(value)}", where=source, remedy="a prompt is a string or a list of messages"
    )


def _messages(value: list[Any], source: str, field: str, notes: Counter[str]) -> list[Message]:
    messages = []
    for number, message in enumerate(value):
        place = f"{field!r}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{place}, is {_kind(message)}", where=source, remedy="a message has role and content"
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
                f"{key} of {place}, is {_kind(message[key])}", where=source, remedy="it must be a string"
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


#: One side of a pair: the turns before the answer (none for a bare completion) and the answer.
_Side = tuple[list[Message], str]


def _sides(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> tuple[_Side, _Side] | None:
    if config.chosen_field is None or config.rejected_field is None:
        return None
    chosen = _field(row, config.chosen_field, source)
    rejected = _field(row, config.rejected_field, source)
    if chosen is None and rejected is None:
        notes["without_pair"] += 1
        return None
    return (
        _side(chosen, source, config.chosen_field, notes),
        _side(rejected, source, config.rejected_field, notes),
    )


def _side(value: Any, source: str, field: str, notes: Counter[str]) -> _Side:
    if isinstance(value, str):
        return [], value
    if not isinstance(value, list):
        raise DataError(
            f"{field!r} is {_kind(value)}", where=source, remedy="give a string or a list of messages"
        )
    messages = _messages(value, source, field, notes)
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{field!r} has no answer", where=source, remedy="its last message must be the assistant's"
        )
    return messages[:-1], messages[-1]["content"]


def _shared_prefix(
    sides: tuple[_Side, _Side] | None, source: str, config: PromptsConfig
) -> list[Message] | None:
    """The turns that both conversations of a pair share before their answers; None without any."""
    if sides is None:
        return None
    prefixes = [prefix for prefix, _ in sides if prefix]
    if len(prefixes) == 2 and prefixes[0] != prefixes[1]:
        raise DataError(
            f"{config.chosen_field!r} and {config.rejected_field!r} differ before their last message",
            where=source,
            remedy="both must answer the same prompt",
        )
    return prefixes[0] if prefixes else None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}")
