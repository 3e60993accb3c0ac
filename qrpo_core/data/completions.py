"""Completions that a data set brings: a preferred and another one, or graded ones.

A completion is a string, a list with the assistant's turn alone, or the whole conversation, whose turns
before the last must be the prompt's. A graded one is a mapping that holds such a value and its reward.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qrpo_core.config import PromptsConfig
from qrpo_core.data.messages import Message, field, kind, nearest, read_messages
from qrpo_core.errors import DataError


class Completion(NamedTuple):
    """One completion of a row.

    place : where in the row it stands: its field, and its number where the field holds several.
    turns : the conversation before it, as the field gives it; empty for a bare completion.
    text : the completion itself.
    reward : the data set's grade; None where it gives none.
    """

    place: str
    turns: list[Message]
    text: str
    reward: float | None = None


def read_completions(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> list[Completion]:
    """Completions of a row: (chosen, rejected), or those of all `completion_fields`; empty for none.

    Raises DataError at `source` for a value of the wrong shape and for a reward that is not a finite
    number. `notes` counts rows without_pair and without_completions, ungraded_completions (an explicit
    null where a reward is asked for), empty_completions and equal_pairs (the same text twice).
    """
    if config.chosen_field is not None and config.rejected_field is not None:
        found = _pair(row, source, (config.chosen_field, config.rejected_field), notes)
    elif config.completion_fields:
        found = _graded(row, source, config, notes)
    else:
        return []
    notes["empty_completions"] += sum(not completion.text for completion in found)
    return found


def shared_turns(completions: Sequence[Completion], source: str) -> tuple[list[Message], str]:
    """The turns that a row's conversations share before their answers, and the place of the first.

    Empty where all are bare completions; DataError where two differ.
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
    row: Mapping[str, Any], source: str, fields: tuple[str, str], notes: Counter[str]
) -> list[Completion]:
    chosen, rejected = (field(row, name, source) for name in fields)
    if chosen is None and rejected is None:
        notes["without_pair"] += 1
        return []
    pair = []
    for name, value in zip(fields, (chosen, rejected), strict=True):
        place = repr(name)
        turns, text = _answer(value, source, place, notes)
        pair.append(Completion(place, turns, text))
    if pair[0].text == pair[1].text:
        notes["equal_pairs"] += 1
    return pair


def _graded(
    row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]
) -> list[Completion]:
    found = []
    for name in config.completion_fields:
        value = field(row, name, source)
        if value is None:
            continue
        if not isinstance(value, list) or _is_conversation(value, config):
            found.append(_completion(value, source, repr(name), config, notes))
            continue
        for number, item in enumerate(value):
            found.append(_completion(item, source, f"item {number} of {name!r}", config, notes))
    notes["without_completions"] += not found
    return found


def _is_conversation(value: list[Any], config: PromptsConfig) -> bool:
    """Whether a list is the messages of one completion rather than several completions."""
    first = value[0] if value else None
    return isinstance(first, Mapping) and "role" in first and config.completion_text_field not in first


def _completion(
    value: Any, source: str, place: str, config: PromptsConfig, notes: Counter[str]
) -> Completion:
    text_field, reward_field = config.completion_text_field, config.completion_reward_field
    if isinstance(value, Mapping):
        if value.get("role") in ("system", "user"):
            raise DataError(
                f"{place} is a turn of role {value['role']!r}, not a completion",
                where=source,
                remedy=f"conversations are read as such where they have no key {text_field!r}; "
                "name another prompts.completion_text_field",
            )
        text = _key(value, text_field, source, place)
        turns, answer = _answer(text, source, f"{text_field!r} of {place}", notes)
        if reward_field is None:
            return Completion(place, turns, answer)
        reward = _reward(_key(value, reward_field, source, place), source, f"{reward_field!r} of {place}")
        notes["ungraded_completions"] += reward is None
        return Completion(place, turns, answer, reward)
    if not isinstance(value, str | list):
        raise DataError(
            f"{place} is {kind(value)}",
            where=source,
            remedy=f"a completion is a string, a list of messages or an object with {text_field!r}",
        )
    if reward_field is not None:
        raise DataError(
            f"{place} is {kind(value)}, which has no place for the reward {reward_field!r}",
            where=source,
            remedy=f"give an object with {text_field!r} and {reward_field!r}, or remove "
            "prompts.completion_reward_field",
        )
    return Completion(place, *_answer(value, source, place, notes))


def _answer(value: Any, source: str, place: str, notes: Counter[str]) -> tuple[list[Message], str]:
    """The turns before the answer (none for a bare completion) and the answer."""
    if isinstance(value, str):
        return [], value
    if not isinstance(value, list):
        raise DataError(
            f"{place} is {kind(value)}", where=source, remedy="give a string or a list of messages"
        )
    messages = read_messages(value, source, place, notes)
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place} has no answer", where=source, remedy="its last message must be the assistant's"
        )
    return messages[:-1], messages[-1]["content"]


def _reward(value: Any, source: str, place: str) -> float | None:
    if value is None:
        return None
    remedy = "a reward is a finite number, true or false; give null where there is none"
    if not isinstance(value, bool | int | float):
        raise DataError(f"{place} is {reprlib.repr(value)}, not a number", where=source, remedy=remedy)
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise DataError(f"{place} is {reward}", where=source, remedy=remedy)
    return reward


def _key(value: Mapping[str, Any], name: str, source: str, place: str) -> Any:
    if name not in value:
        raise DataError(f"{place} has no {name!r}", where=source, remedy=nearest(name, value))
    return value[name]
