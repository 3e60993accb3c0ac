"""Prompt sources: every kind becomes one table of distinct prompts, split by prompt_id.

kind: template
    Sentences with {slots} filled from word lists (`templates`, `words`). `size` distinct ones are drawn
    by `seed`; a larger size keeps the earlier ones. No ground truths.

kind: reasoning_gym
    `size` distinct questions of a reasoning-gym `task` with `parameters`, drawn by `seed`; a larger size
    keeps the earlier ones. The ground truth holds the task's entry, for the task's own scorer.

kind: file
    JSON Lines, a JSON array, CSV or Parquet at `path` (files.py), local or s3://. The name of a field may
    be a path of keys joined by dots. `prompt_field` holds a string (one user turn), or a message or a list
    of messages (messages.py), ending with a user turn; `system_field`, if named, the system turn before it.
    `ground_truth_field`, if named, holds any JSON value; an explicit null is a row without.
    `ground_truth_fields`, if named, make an object of several columns the ground truth.
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
prompts are merged with their completions, unequal ground truths of one prompt are refused, and `limit` keeps
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

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.common.extras import require
from qrpo_core.common.schemas import PROMPTS, check_table
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.files import file_digest, read_file
from qrpo_core.data.generated import draw_tasks, draw_templates
from qrpo_core.data.hub import hub_identity, read_hub
from qrpo_core.data.offline import OfflineRows, from_rows
from qrpo_core.data.rows import Message, Row, parse_row
from qrpo_core.data.unusable import UNREADABLE, Unusable, report_unusable

#: Rows that are collected before they become an Arrow table.
_CHUNK = 4096
#: If the first rows, this many, are all unreadable, the config names the wrong fields: stop reading.
_HOPELESS = 100


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source and its own completions.

    prompts : table `schemas.PROMPTS`, one row a distinct prompt, in order of first occurrence.
    offline : table `schemas.OFFLINE`, grouped by prompt. Every distinct pair is two rows, chosen and
        rejected; every other distinct completion is one row.
    counts : what happened to the rows; read = prompts + merged + filtered.
        Always: read (rows, or items drawn), merged (rows that repeat a prompt with an equal ground truth),
        filtered (prompts beyond `limit`), prompts, train, held_out.
        If not 0, over all rows: blank_lines, without_ground_truth, without_pair, equal_pairs (chosen and
        rejected are the same text; both are kept), without_completions, ungraded_completions,
        empty_completions, ignored_message_keys, unreadable_rows and contradicting_rows (left out by
        `on_unusable`, not in read).
        If not 0, over the prompts within `limit`: equal_but_for_space (prompts that differ from an earlier
        one in white space alone; they are kept and may be on the other side of the split), repeated_pairs and
        repeated_completions (taken once).
        If not 0: in_evaluation_prompts (prompts that are left out of training since they are evaluated on).
    overlap : the places of those.
    """

    prompts: pa.Table
    offline: pa.Table
    counts: dict[str, int]
    overlap: tuple[str, ...] = ()


def load_prompts(config: PromptsConfig, storage_options: dict[str, Any] | None = None) -> PromptSet:
    """Return the prompts of the configured source.

    storage_options : for fsspec, if the path has a protocol (s3://).

    Raises ConfigError for a config that contradicts itself. Raises DataError for a missing or empty source,
    for unreadable rows, for unequal ground truths of one prompt or rewards of one completion (all such rows
    at once, with their places), and for a split that leaves nothing to train on or to evaluate on.
    """
    notes: Counter[str] = Counter()
    table, bad = _Table(config), _UnusableRows(config)
    for row in _rows(config, storage_options, notes, bad):
        try:
            table.add(row)
        except DataError as error:
            bad.contradicting.append(error)
    bad.report(notes, some_are_good=table.read > 0)
    if not table.read:
        raise DataError("the data set is empty", where=_where(config), remedy="give it at least two prompts")
    return table.finish(notes)


def source_identity(config: PromptsConfig, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the identity of the source for a recipe, ready for JSON.

    template: {}. reasoning_gym: {"reasoning_gym": version}. file: {"sha256": ...} of its bytes.
    hub: {"commit": ...}, or {"files": {path: sha256}} of a local directory.
    So a recipe needs neither path nor name nor revision. No row is read. Raises DataError if the source is
    missing.
    """
    if config.kind == "reasoning_gym":
        require("reasoning_gym", "prompts.kind 'reasoning_gym'", where="prompts.kind")
        return {"reasoning_gym": importlib.metadata.version("reasoning-gym")}
    if config.kind == "file":
        return {"sha256": file_digest(config.path or "", storage_options)}
    if config.kind == "hub":
        return hub_identity(config)
    return {}


def _rows(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str], bad: _UnusableRows
) -> Iterator[Row]:
    if config.kind == "template":
        yield from draw_templates(config)
    elif config.kind == "reasoning_gym":
        yield from draw_tasks(config, notes)
    else:
        yield from _read(config, storage_options, notes, bad)


def _read(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str], bad: _UnusableRows
) -> Iterator[Row]:
    """Yield the rows of a file or a data set. Unreadable rows go to `bad`."""
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


class _UnusableRows:
    """Rows that cannot be used: reported together at the end, or left out and counted.

    unreadable : rows without the form that the config names.
    contradicting : rows that contradict an earlier row.
    """

    def __init__(self, config: PromptsConfig) -> None:
        self.config = config
        self.unreadable: list[DataError] = []
        self.contradicting: list[DataError] = []

    def report(self, notes: Counter[str], *, some_are_good: bool) -> None:
        """Raise one error that names all rows, or count them if `on_unusable` is skip."""
        found = [*self.unreadable, *self.contradicting]
        if found and not some_are_good and len({re.sub(r"\d+", "", error.message) for error in found}) == 1:
            raise found[0]  # all rows have the same problem, so the config is wrong; a list would not help
        if len(found) == 1 and self.config.on_unusable == "refuse":
            raise found[0]
        unusable = [_unusable(error, UNREADABLE) for error in self.unreadable]
        unusable += [_unusable(error, "that contradict another row") for error in self.contradicting]
        report_unusable(unusable, self.config.on_unusable if some_are_good else "refuse")
        notes["unreadable_rows"] += len(self.unreadable)
        notes["contradicting_rows"] += len(self.contradicting)


def _unusable(error: DataError, kind: str) -> Unusable:
    return Unusable(None, error.where or "", error.message, error.remedy or "mend it", kind)


def _where(config: PromptsConfig) -> str:
    return config.path or config.name or config.task or "prompts"


class _Table:
    """Merges, limits and splits rows, and builds the tables. Rows become Arrow in chunks to save memory."""

    def __init__(self, config: PromptsConfig) -> None:
        self.config = config
        self.read = 0
        self.counts = Counter[str]()
        self.chunks: list[pa.Table] = []
        self.rows: list[tuple[Any, ...]] = []
        #: By prompt: digest of its ground truth, its first place, whether it is within the limit.
        self.seen: dict[str, tuple[str, str, bool]] = {}
        #: Digests of the prompts with white space folded.
        self.spaceless: set[str] = set()
        self.offline = OfflineRows()

    def add(self, row: Row) -> None:
        """Add a row. Raises DataError, and adds nothing, if it contradicts an earlier row."""
        messages = with_opening(row.messages, self.config)
        prompt, ground_truth, digest = _names(row, messages)
        before = self.seen.get(prompt)
        if before is not None and before[0] != digest:
            raise DataError(
                f"the prompt of {before[1]} stands here with another ground truth",
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
                self._keep(prompt, messages, ground_truth, digest, row.source)

    def _keep(
        self, prompt: str, messages: list[Message], ground_truth: str | None, digest: str, source: str
    ) -> None:
        split = "held_out" if hashing.split_fraction(prompt) < self.config.held_out else "train"
        self.counts["prompts"] += 1
        self.counts[split] += 1
        self.rows.append((prompt, messages, ground_truth, digest, source, split))
        if len(self.rows) == _CHUNK:
            self._flush()

    def _count_twin(self, messages: list[Message]) -> None:
        """Count a prompt that differs from an earlier one in white space alone. Both are kept."""
        bare = hashing.prompt_id([turn | {"content": " ".join(turn["content"].split())} for turn in messages])
        self.counts["equal_but_for_space"] += bare in self.spaceless
        self.spaceless.add(bare)

    def _flush(self) -> None:
        self.chunks.append(from_rows(self.rows, PROMPTS))
        self.rows.clear()

    def finish(self, notes: Counter[str]) -> PromptSet:
        """Return the checked tables and the counts. Raises DataError if one side of the split is empty."""
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


def with_opening(messages: list[Message], config: PromptsConfig) -> list[Message]:
    """A prompt with the turns that the configuration puts before it: system turn, then examples."""
    first = sum(message["role"] == "system" for message in messages[:1])
    opening = messages[:first]
    if config.system is not None and not any(message["role"] == "system" for message in messages):
        opening = [{"role": "system", "content": config.system}]
    for example in config.examples:
        opening.append({"role": "user", "content": example.prompt})
        opening.append({"role": "assistant", "content": example.completion})
    return [*opening, *messages[first:]]


def _names(row: Row, messages: list[Message]) -> tuple[str, str | None, str]:
    """Return (prompt_id, ground truth as canonical JSON or None, its digest or "")."""
    try:
        prompt = hashing.prompt_id(messages)
        for completion in (*(row.pair or ()), *row.completions):
            completion.text.encode()
        if row.ground_truth is None:
            return prompt, None, ""
        return prompt, hashing.canonical_json(row.ground_truth), hashing.digest_json(row.ground_truth)
    except UnicodeEncodeError:
        raise DataError(
            "a text holds half of a surrogate pair", where=row.source, remedy="mend the \\ud... escape"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the ground truth is not a JSON value: {error}",
            where=row.source,
            remedy="give numbers, strings, lists or objects",
        ) from None


def _check_split(config: PromptsConfig, counts: dict[str, int]) -> None:
    if config.held_out in (0, 1):  # prompts that are only trained on, or only evaluated on
        return
    for side, purpose, change in (("held_out", "held out", "raise"), ("train", "left to train on", "lower")):
        if not counts[side]:
            raise DataError(
                f"no prompt is {purpose}: {counts['prompts']} prompts, prompts.held_out {config.held_out}",
                where=_where(config),
                remedy=f"{change} prompts.held_out or give more prompts",
            )
