"""Prompt sources: every kind becomes one table of distinct prompts, split by prompt_id.

kind: template
    Sentences with {slots} filled from word lists (`templates`, `words`). `size` distinct ones are drawn
    by `seed`; a larger size keeps the earlier ones. No references.

kind: reasoning_gym
    `size` distinct questions of a reasoning-gym `task` with `parameters`, drawn by `seed`; a larger size
    keeps the earlier ones. The reference holds the task's entry, for the task's own scorer.

kind: file
    JSON Lines, a JSON array, CSV or Parquet at `path` (readers.py), local or s3://. The name of a field may
    be a path of keys joined by dots. `prompt_field` holds a string (one user turn), or a message or a list
    of messages (messages.py), ending with a user turn; `system_field`, if named, the system turn before it.
    `reference_field`, if named, holds any JSON value; an explicit null is a row without.
    `reference_fields`, if named, make an object of several columns the reference.
    `chosen_field` and `rejected_field`, if named, hold completions: a string, one assistant's message, a
    list with it alone, or the whole conversation, whose turns before the last must be the prompt's.
    `completion_fields`, if named, are columns of further completions: each a completion as above, a
    mapping that holds one under `completion_text_field`, a list of either, or null.
    Grades (grades.py) stand in such a mapping, in a column beside a completion, or in a list in step with a
    list of completions; which is said by `completion_reward_field`, by `completion_reward_fields` (one for
    each of `completion_fields`), by `completion_reward_weights` (a weighted sum), and for pairs by
    `chosen_reward_field` and `rejected_reward_field`. A minus before a name: less is better.
    Where completions are conversations the prompt field may be absent, unless prompts.prompt_field was set.
    `string_format` says what strings hold (strings.py).

kind: hub
    A Hugging Face data set by `name`, `revision`, `subset` and `split`, or a local data set directory; files
    and fields as in kind file. With `streaming` rows are read as they arrive.

For all kinds `system` is put before prompts that have no system turn (and makes them other prompts), equal
prompts are merged with their completions, unequal references of one prompt are refused, and `limit` keeps
the first prompts. Equal completions of a prompt are one; unequal rewards of one are refused.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qrpo_core import ids
from qrpo_core.data.config import PromptsConfig
from qrpo_core.data.generated import draw_tasks, draw_templates
from qrpo_core.data.hub import hub_identity, read_hub
from qrpo_core.data.offline import OfflineRows, from_rows
from qrpo_core.data.readers import file_digest, read_file
from qrpo_core.data.rows import Message, Row, parse_row
from qrpo_core.data.unusable import UNREADABLE, Unusable, report_unusable
from qrpo_core.errors import DataError
from qrpo_core.records import PROMPTS, check_table

#: Rows that are collected before they become Arrow.
_CHUNK = 4096
#: Where so many rows cannot be read and none before them could, the fields are named wrongly: no list helps.
_HOPELESS = 100


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source.

    prompts : table `records.PROMPTS`, one row a distinct prompt, in source order of first occurrence.
    offline : table `records.OFFLINE`, grouped by prompt: every different pair as two rows, chosen and
        rejected, or every different further completion as one. Empty without pairs and completions.
    counts : what happened to the rows. Always there: read (rows, or items drawn), merged (rows whose prompt
        came before, with an equal reference), filtered (prompts beyond `limit`, all their first rows),
        prompts, train, held_out. read = prompts + merged + filtered. Where they occur, over all rows:
        blank_lines, without_reference, without_pair, equal_pairs (chosen and rejected are the same text;
        they are kept), without_completions, ungraded_completions (no reward where one is asked for),
        empty_completions, ignored_message_keys, unreadable_rows and contradicting_rows (left out by
        `on_unusable`, not in read); over the prompts within `limit`: equal_but_for_space
        (prompts that differ from an earlier one in white space alone; they are kept, and may lie on the
        other side of the split), repeated_pairs and repeated_completions (equal to an earlier one of the
        same prompt; they are taken once).
    """

    prompts: pa.Table
    offline: pa.Table
    counts: dict[str, int]


def load_prompts(config: PromptsConfig, storage_options: dict[str, Any] | None = None) -> PromptSet:
    """Read or draw the prompts that the config asks for.

    `storage_options` go to fsspec for a path with a protocol (s3://) and are not used otherwise.
    Raises ConfigError for a source that cannot be meant, and DataError for one that cannot be read:
    missing, empty, unreadable rows, unequal references of one prompt or rewards of one completion (all such
    rows together, with their places), or a split that leaves nothing to train on or nothing to evaluate on.
    """
    notes: Counter[str] = Counter()
    table, bad = _Table(config), _Bad(config)
    for row in _rows(config, storage_options, notes, bad):
        try:
            table.add(row)
        except DataError as error:
            bad.contradicting.append(error)
    bad.tell(notes, some_are_good=table.read > 0)
    if not table.read:
        raise DataError("the data set is empty", where=_where(config), remedy="give it at least two prompts")
    return table.finish(notes)


def source_identity(config: PromptsConfig, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a recipe must know of the source beyond the config, JSON-ready.

    template: nothing. reasoning_gym: {"reasoning_gym": version}. file: {"sha256": ...} of the bytes, so
    the path itself may be left out of the recipe. hub: {"commit": ...}, or {"files": {path: sha256}} of a
    local directory, so name and revision may be left out.
    No rows are read and neither datasets nor reasoning_gym is imported. Raises DataError for what is missing.
    """
    if config.kind == "reasoning_gym":
        return {"reasoning_gym": importlib.metadata.version("reasoning-gym")}
    if config.kind == "file":
        return {"sha256": file_digest(config.path or "", storage_options)}
    if config.kind == "hub":
        return hub_identity(config)
    return {}


def _rows(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str], bad: _Bad
) -> Iterator[Row]:
    if config.kind == "template":
        yield from draw_templates(config)
    elif config.kind == "reasoning_gym":
        yield from draw_tasks(config, notes)
    else:
        yield from _read(config, storage_options, notes, bad)


def _read(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str], bad: _Bad
) -> Iterator[Row]:
    """The rows of a file or a data set; those that cannot be read go to `bad`."""
    raw = read_file(config, storage_options, notes) if config.kind == "file" else read_hub(config, notes)
    good = False
    for fields, source in raw:
        try:
            if isinstance(fields, DataError):
                raise fields
            row = parse_row(fields, source, config, notes)
        except DataError as error:
            bad.unreadable.append(error)
            if not good and len(bad.unreadable) == _HOPELESS:
                raise bad.unreadable[0] from None
            continue
        good = True
        yield row


class _Bad:
    """Rows that cannot be used: told together at the end, or left out and counted.

    unreadable : those that do not have the form that the config names.
    contradicting : those that say something else than an earlier one.
    """

    def __init__(self, config: PromptsConfig) -> None:
        self.config = config
        self.unreadable: list[DataError] = []
        self.contradicting: list[DataError] = []

    def tell(self, notes: Counter[str], *, some_are_good: bool) -> None:
        """Raise one error that names all rows, or count them where the config leaves them out."""
        found = [*self.unreadable, *self.contradicting]
        if found and not some_are_good and len({re.sub(r"\d+", "", error.message) for error in found}) == 1:
            raise found[0]  # no row has the form that the config names; their list would not help
        if len(found) == 1 and self.config.on_unusable == "refuse":
            raise found[0]
        told = [_unusable(error, UNREADABLE) for error in self.unreadable]
        told += [_unusable(error, "that contradict another row") for error in self.contradicting]
        report_unusable(told, self.config.on_unusable if some_are_good else "refuse")
        notes["unreadable_rows"] += len(self.unreadable)
        notes["contradicting_rows"] += len(self.contradicting)


def _unusable(error: DataError, kind: str) -> Unusable:
    return Unusable(None, error.where or "", error.message, error.remedy or "mend it", kind)


def _where(config: PromptsConfig) -> str:
    return config.path or config.name or config.task or "prompts"


class _Table:
    """Collects rows into the tables: merges, limits, splits. Rows go to Arrow in chunks, to save memory."""

    def __init__(self, config: PromptsConfig) -> None:
        self.config = config
        self.read = 0
        self.counts = Counter[str]()
        self.chunks: list[pa.Table] = []
        self.rows: list[tuple[Any, ...]] = []
        #: Of every prompt: digest of its reference, its first place, whether it is within the limit.
        self.seen: dict[str, tuple[str, str, bool]] = {}
        #: Digests of the prompts without regard to white space.
        self.spaceless: set[str] = set()
        self.offline = OfflineRows()

    def add(self, row: Row) -> None:
        """Take one row; DataError, and nothing taken, if it says something else than an earlier one."""
        messages = _with_system(row.messages, self.config.system)
        prompt, reference, digest = _names(row, messages)
        before = self.seen.get(prompt)
        if before is not None and before[0] != digest:
            raise DataError(
                f"the prompt of {before[1]} stands here with another reference",
                where=row.source,
                remedy="keep one of the two rows",
            )
        within = self.config.limit is None or self.counts["prompts"] < self.config.limit
        kept = within if before is None else before[2]
        if kept:
            self.offline.check(prompt, row)
            self.offline.add(prompt, row)
        self.read += 1
        if before is None:
            self.seen[prompt] = (digest, row.source, kept)
            if kept:
                self._count_twin(messages)
                self._keep(prompt, messages, reference, digest, row.source)

    def _keep(
        self, prompt: str, messages: list[Message], reference: str | None, digest: str, source: str
    ) -> None:
        split = "held_out" if ids.split_fraction(prompt) < self.config.held_out else "train"
        self.counts["prompts"] += 1
        self.counts[split] += 1
        self.rows.append((prompt, messages, reference, digest, source, split))
        if len(self.rows) == _CHUNK:
            self._flush()

    def _count_twin(self, messages: list[Message]) -> None:
        """Count a prompt that is an earlier one but for white space: both are kept."""
        bare = ids.prompt_id([turn | {"content": " ".join(turn["content"].split())} for turn in messages])
        self.counts["equal_but_for_space"] += bare in self.spaceless
        self.spaceless.add(bare)

    def _flush(self) -> None:
        self.chunks.append(from_rows(self.rows, PROMPTS))
        self.rows.clear()

    def finish(self, notes: Counter[str]) -> PromptSet:
        """The tables, checked, and the counts; DataError if one side of the split is empty."""
        self._flush()
        repeated = notes.pop("repeated", 0)
        notes.update(self.offline.counts)
        notes["equal_but_for_space"] = self.counts["equal_but_for_space"]
        counts = {
            "read": self.read + repeated,
            "merged": self.read - len(self.seen) + repeated,
            "filtered": len(self.seen) - self.counts["prompts"],
            **{name: self.counts[name] for name in ("prompts", "train", "held_out")},
            **{name: count for name, count in sorted(notes.items()) if count},
        }
        _check_split(self.config, counts)
        prompts = check_table(pa.concat_tables(self.chunks), PROMPTS, "prompts")
        return PromptSet(prompts, self.offline.table(), counts)


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _names(row: Row, messages: list[Message]) -> tuple[str, str | None, str]:
    """(prompt_id, reference as canonical JSON or None, its digest or "")."""
    try:
        prompt = ids.prompt_id(messages)
        for completion in (*(row.pair or ()), *row.completions):
            completion.text.encode()
        if row.reference is None:
            return prompt, None, ""
        return prompt, ids.canonical_json(row.reference), ids.digest_json(row.reference)
    except UnicodeEncodeError:
        raise DataError(
            "a text holds half of a surrogate pair", where=row.source, remedy="mend the \\ud... escape"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the reference is not a JSON value: {error}",
            where=row.source,
            remedy="give numbers, strings, lists or objects",
        ) from None


def _check_split(config: PromptsConfig, counts: dict[str, int]) -> None:
    for side, purpose, change in (("held_out", "held out", "raise"), ("train", "left to train on", "lower")):
        if not counts[side]:
            raise DataError(
                f"no prompt is {purpose}: {counts['prompts']} prompts, prompts.held_out {config.held_out}",
                where=_where(config),
                remedy=f"{change} prompts.held_out or give more prompts",
            )
