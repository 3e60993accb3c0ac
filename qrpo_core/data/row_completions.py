"""The completions in a row: chosen and rejected, or graded ones.

A completion is a string, one message of the assistant, a list of that message, or the whole conversation,
which must begin with the prompt. A graded completion has its grades beside it in the row, or is a mapping
that holds text and grades.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.fields import ABSENT, field, kind, lookup, nearest
from qrpo_core.data.grades import Grade, Place, grades_of, read_number, read_reward
from qrpo_core.data.messages import Message, is_answer, is_message, read_messages
from qrpo_core.data.strings import read_string


class Completion(NamedTuple):
    """One completion of a row.

    place : its field, with its number if the field holds several.
    turns : the conversation before it in its field; empty for a bare completion.
    text : the completion itself.
    reward : the data set's grade, or None.
    """

    place: str
    turns: list[Message]
    text: str
    reward: float | None = None


def read_completions(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> list[Completion]:
    """Return the completions of a row: [chosen, rejected], or those of all `completion_fields`.

    Raises DataError at `source` for a value of the wrong shape and for a reward that is not a finite number.
    `notes` counts rows without_pair and without_completions, ungraded_completions (null, or a text such as
    N/A), empty_completions and equal_pairs (the same text twice).
    """
    if config.chosen_field is not None and config.rejected_field is not None:
        found = _pair(row, source, config, notes)
    elif config.completion_fields:
        found = _graded(row, source, config, notes)
    else:
        return []
    notes["empty_completions"] += sum(not completion.text for completion in found)
    if config.graded:
        notes["ungraded_completions"] += sum(completion.reward is None for completion in found)
    return found


def shared_turns(completions: Sequence[Completion], source: str) -> tuple[list[Message], str]:
    """Return the turns before the answers of a row's conversations, and the place of the first conversation.

    Empty if all completions are bare. Raises DataError if two conversations differ.
    """
    held = [completion for completion in completions if completion.turns]
    for completion in held[1:]:
        if completion.turns != held[0].turns:
            raise DataError(
                f"{held[0].place} and {completion.place} differ before their last message",
                where=source,
                remedy="both must answer the same prompt",
            )
    return (held[0].turns, held[0].place) if held else ([], "")


def _pair(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> list[Completion]:
    names = (config.chosen_field or "", config.rejected_field or "")
    chosen, rejected = (field(row, name, source) for name in names)
    if chosen is None and rejected is None:
        notes["without_pair"] += 1
        return []
    pair = []
    rewards = (config.chosen_reward_field, config.rejected_reward_field)
    for name, value, reward in zip(names, (chosen, rejected), rewards, strict=True):
        turns, text = _answer(value, source, repr(name), config, notes)
        given = None
        if reward is not None:
            grade = Grade.signed(reward)
            given = read_number(field(row, grade.name, source), repr(grade.name), source)
            given = None if given is None else given * grade.weight + 0.0
        pair.append(Completion(repr(name), turns, text, given))
    if pair[0].text == pair[1].text:
        notes["equal_pairs"] += 1
    return pair


def _graded(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> list[Completion]:
    found = []
    shared = len(config.completion_fields) > 1 and not config.completion_reward_fields
    for name, grades in zip(config.completion_fields, grades_of(config), strict=True):
        value = field(row, name, source)
        if value is None:
            continue
        if not isinstance(value, list) or _is_conversation(value, config):
            place = Place(row, source, repr(name), shared=shared)
            found.append(_completion(value, grades, place, config, notes))
            continue
        for number, item in enumerate(value):
            place = Place(row, source, f"item {number} of {name!r}", number, len(value), shared)
            found.append(_completion(item, grades, place, config, notes))
    notes["without_completions"] += not found
    return found


def _is_conversation(value: list[Any], config: PromptsConfig) -> bool:
    """Whether a list is the messages of one completion rather than several completions.

    Several messages that are all the assistant's are several completions.
    """
    if not value or not is_message(value[0]) or config.completion_text_field in value[0]:
        return False
    return len(value) == 1 or any(not is_answer(item) for item in value)


def _completion(
    value: Any, grades: Sequence[Grade], place: Place, config: PromptsConfig, notes: Counter[str]
) -> Completion:
    text, name = value, place.name
    if isinstance(value, Mapping):
        key = config.completion_text_field
        text = lookup(value, key)
        name = f"{key!r} of {name}"
        if text is ABSENT and is_message(value):
            text, name = value, place.name
        elif text is ABSENT:
            raise DataError(f"{place.name} has no {key!r}", where=place.source, remedy=nearest(key, value))
        elif value.get("role", value.get("from")) in ("system", "user", "human"):
            raise DataError(
                f"{place.name} is a turn of role {value.get('role', value.get('from'))!r}, not a completion",
                where=place.source,
                remedy=f"conversations are read as such where they have no key {key!r}; "
                "name another prompts.completion_text_field",
            )
    elif not isinstance(value, str | list):
        raise DataError(
            f"{place.name} is {kind(value)}",
            where=place.source,
            remedy="a completion is a string, a list of messages or an object with "
            f"{config.completion_text_field!r}",
        )
    turns, answer = _answer(text, place.source, name, config, notes)
    reward = read_reward(value, grades, place) if grades else None
    return Completion(place.name, turns, answer, reward)


def _answer(
    value: Any, source: str, place: str, config: PromptsConfig, notes: Counter[str]
) -> tuple[list[Message], str]:
    """Return the turns before the answer (none for a bare completion) and the answer."""
    if isinstance(value, str):
        value = read_string(value, config.string_format, source, place, notes)
        if isinstance(value, str):
            # The space behind "Assistant:" belongs to the transcript.
            return [], value.strip() if config.string_format == "transcript" else value
        messages = value
    elif isinstance(value, list) or is_message(value):
        messages = read_messages(value, source, place, notes)
    else:
        raise DataError(
            f"{place} is {kind(value)}", where=source, remedy="give a string, a message or a list of messages"
        )
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place} has no answer", where=source, remedy="its last message must be the assistant's"
        )
    return messages[:-1], messages[-1]["content"]
