"""One row of a file or a data set as a prompt with its ground truth and completions.

Every problem is a DataError with the row's place (file and line, data set and index) and a remedy. Legal
values that are ignored, such as extra keys of a message, are counted in `notes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.fields import ABSENT, column, field, kind, lookup, nearest
from qrpo_core.data.grades import Grade, grades_of
from qrpo_core.data.messages import Message, is_message, read_messages
from qrpo_core.data.prerendered import refuse_prerendered
from qrpo_core.data.row_completions import Completion, read_completions, shared_turns
from qrpo_core.data.strings import read_string

__all__ = ["Message", "Row", "check_columns", "check_prompt", "nearest", "parse_row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a source.

    messages : the conversation; its last turn is the user's.
    source : its place, for messages.
    ground_truth : any JSON value that a verifier checks against, or None.
    pair : (chosen, rejected), or None.
    completions : other completions, graded or not.
    """

    messages: list[Message]
    source: str
    ground_truth: Any = None
    pair: tuple[Completion, Completion] | None = None
    completions: tuple[Completion, ...] = ()


def parse_row(row: Mapping[str, Any], source: str, config: PromptsConfig, notes: Counter[str]) -> Row:
    """Return the row in a mapping, read by the field names of the config.

    Raises DataError at `source` for a missing field, a prompt of the wrong shape, completions that do not
    answer the prompt, or a text that carries a chat template already. `notes` counts rows with a null ground
    truth, and what `read_completions` counts.
    """
    ground_truth = None
    if config.ground_truth_field is not None:
        ground_truth = field(row, config.ground_truth_field, source)
        notes["without_ground_truth"] += ground_truth is None
    elif config.ground_truth_fields:
        ground_truth = {name: field(row, name, source) for name in config.ground_truth_fields}
    completions = read_completions(row, source, config, notes)
    prefix, place = shared_turns(completions, source)
    given = lookup(row, config.prompt_field)
    if (given is None or given is ABSENT) and prefix and "prompt_field" not in config.model_fields_set:
        messages = prefix
    else:
        given = field(row, config.prompt_field, source)
        messages = _prompt(given, source, config, notes)
        if prefix and prefix != messages:
            # A prompt string states the user turn alone; the conversation may add the system turn to it.
            if not isinstance(given, str) or [m for m in prefix if m["role"] != "system"] != messages:
                raise DataError(
                    f"{place} is a conversation that does not start with the prompt",
                    where=source,
                    remedy=f"the turns before the last one must be those of {config.prompt_field!r}",
                )
            messages = prefix
    messages = _with_system(messages, row, source, config)
    check_prompt(messages, source, config.prompt_field)
    for message in messages:
        what = f"the {message['role']} turn {message['content'].strip()[:40]!r}"
        refuse_prerendered(message["content"], what, source, answer=message["role"] == "assistant")
    for completion in completions:
        refuse_prerendered(completion.text, completion.place, source, answer=True)
    if config.completion_fields:
        return Row(messages, source, ground_truth, completions=tuple(completions))
    pair = (completions[0], completions[1]) if completions else None
    return Row(messages, source, ground_truth, pair)


def check_prompt(messages: list[Message], source: str, name: str) -> None:
    """Raise DataError for a prompt without turns, without text, or whose last turn is not the user's."""
    if not messages:
        raise DataError("the prompt has no messages", where=source, remedy=f"fill {name!r} or remove the row")
    last = messages[-1]
    if last["role"] != "user":
        raise DataError(
            f"the prompt in {name!r} ends with a turn of role {last['role']!r}",
            where=source,
            remedy="a prompt ends with a user turn; name conversations with their answer by "
            "prompts.chosen_field and prompts.rejected_field or by prompts.completion_fields, or cut the "
            "last turn",
        )
    if not last["content"].strip():
        raise DataError("the prompt is empty", where=source, remedy=f"fill {name!r} or remove the row")


def check_columns(columns: Iterable[str], config: PromptsConfig, where: str) -> list[str]:
    """Return the columns to read of a table. Raises DataError for a configured column that is absent.

    The prompt's column may be absent if conversations in the completions hold it and `prompt_field` is not
    set. Grades may be inside the completions.
    """
    known = list(columns)
    wanted = [config.prompt_field, config.system_field, config.ground_truth_field]
    wanted += [config.chosen_field, config.rejected_field]
    wanted += [
        Grade.signed(name).name
        for name in (config.chosen_reward_field, config.rejected_reward_field)
        if name is not None
    ]
    wanted += [*config.ground_truth_fields, *config.completion_fields]
    inner = [grade.name for grades in grades_of(config) for grade in grades]
    answered = config.chosen_field is not None or bool(config.completion_fields)
    optional = set(inner)
    if answered and "prompt_field" not in config.model_fields_set:
        optional.add(config.prompt_field)
    found: list[str] = []
    for name in dict.fromkeys([*wanted, *inner]):
        if name is None:
            continue
        root = column(name, known)
        if root in known:
            found += [root] if root not in found else []
        elif name not in optional:
            raise DataError(f"no column {name!r}", where=where, remedy=nearest(name, known))
    return found


def _prompt(value: Any, source: str, config: PromptsConfig, notes: Counter[str]) -> list[Message]:
    name = config.prompt_field
    if isinstance(value, str):
        found = read_string(value, config.string_format, source, repr(name), notes, is_prompt=True)
        if isinstance(found, list):
            return found
        if config.string_format in ("json", "transcript") and found == value:
            raise DataError(
                f"{name!r} is a string that is no {config.string_format} of turns",
                where=source,
                remedy="prompts.string_format says what every prompt is; mend or remove the row",
            )
        return [{"role": "user", "content": found}]
    if isinstance(value, list) or is_message(value):
        return read_messages(value, source, repr(name), notes)
    raise DataError(
        f"{name!r} is {kind(value)}",
        where=source,
        remedy="a prompt is a string, a message or a list of messages",
    )


def _with_system(
    messages: list[Message], row: Mapping[str, Any], source: str, config: PromptsConfig
) -> list[Message]:
    """The conversation behind the system turn of the row's own column, where it has one."""
    if config.system_field is None:
        return messages
    system = field(row, config.system_field, source)
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(
            f"{config.system_field!r} is {kind(system)}", where=source, remedy="a system turn is a string"
        )
    turn = {"role": "system", "content": system}
    if messages[:1] == [turn]:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise DataError(
            f"the prompt has a system turn, and {config.system_field!r} another one",
            where=source,
            remedy="remove prompts.system_field or the system turn of the prompt",
        )
    return [turn, *messages]
