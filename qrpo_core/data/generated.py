"""Generated prompts: sentences over word lists, and reasoning-gym tasks.

A larger `size` keeps the earlier prompts, in their order.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import string
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qrpo_core.common import hashing
from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.common.extras import require
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.rows import Row, check_prompt, nearest

#: Most combinations of templates and words. All are ranked; this many take about 10 s.
MAX_COMBINATIONS = 1_000_000

#: Items of one reasoning-gym data set. It is fixed because some tasks draw other items for another size.
CHUNK = 1000

#: Distance between the library's seeds of neighbouring prompts.seed. The library's item i has seed `seed +
#: i`, so its seeds 0 and 1 share all items but one.
SEED_STRIDE = 1_000_000


def draw_templates(config: PromptsConfig) -> Iterator[Row]:
    """Yield `config.size` distinct sentences: those with the smallest digests of (seed, sentence).

    The rank of a sentence depends on the seed and its text alone. So a larger size, another word or another
    template keeps the sentences drawn so far (or pushes a few out), in their order.
    Raises ConfigError for a slot without words, words without a slot, or a size above the number of
    sentences.
    """
    slots = [_slots(template, number) for number, template in enumerate(config.templates)]
    _check_words(config, slots)
    combinations = sum(math.prod(len(config.words[name]) for name in names) for names in slots)
    if combinations > MAX_COMBINATIONS:
        raise ConfigError(
            f"templates and words give {combinations:,} combinations, more than {MAX_COMBINATIONS:,}",
            where="prompts.words",
            remedy="shorten the word lists or use fewer slots in a template",
        )
    sentences: dict[str, str] = {}
    for number, (template, names) in enumerate(zip(config.templates, slots, strict=True)):
        for words in itertools.product(*(config.words[name] for name in names)):
            text = template.format_map(dict(zip(names, words, strict=True)))
            sentences.setdefault(text, f"template {number}")
    size = config.size or 0
    if size > len(sentences):
        raise ConfigError(
            f"prompts.size is {size:,}, but templates and words give {len(sentences):,} distinct prompts",
            where="prompts.size",
            remedy=f"set it to {len(sentences):,} or less, or add words",
        )
    ranked = sorted(sentences, key=lambda text: hashing.digest_json([config.seed, text]))
    for text in ranked[:size]:
        messages = [{"role": "user", "content": text}]
        check_prompt(messages, sentences[text], "prompts.templates")
        yield Row(messages, sentences[text])


def _slots(template: str, number: int) -> list[str]:
    """Return the names of a template's slots, in order of first appearance."""
    where = f"prompts.templates[{number}]"
    names: dict[str, None] = {}
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"cannot read template {template!r}: {error}", where=where, remedy="write a literal brace twice"
        ) from None
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ConfigError(
                f"slot {name!r} of template {template!r} is not a plain name",
                where=where,
                remedy="write slots as {name}, a literal brace twice",
            )
        names[name] = None
    return list(names)


def _check_words(config: PromptsConfig, slots: list[list[str]]) -> None:
    used = {name for names in slots for name in names}
    for number, names in enumerate(slots):
        for name in names:
            if name not in config.words:
                known = nearest(name, config.words) if config.words else "there are no lists"
                raise ConfigError(
                    f"slot {name!r} of template {config.templates[number]!r} has no word list",
                    where=f"prompts.templates[{number}]",
                    remedy=f"add prompts.words.{name}; {known}",
                )
    for name, words in config.words.items():
        if name not in used:
            remedy = nearest(name, used) if used else "remove it"
            raise ConfigError(
                f"no template has a slot {name!r}", where=f"prompts.words.{name}", remedy=remedy
            )
        if not words:
            raise ConfigError(
                f"the word list of {name!r} is empty", where=f"prompts.words.{name}", remedy="add words"
            )


def draw_tasks(config: PromptsConfig, notes: Counter[str]) -> Iterator[Row]:
    """Yield `config.size` distinct questions of a reasoning-gym task, in the order of the library's items.

    Item i is item i % CHUNK of the library's data set with seed `SEED_STRIDE * seed + CHUNK * (i // CHUNK)`
    and size CHUNK. A question that comes again is skipped and counted in notes["repeated"].

    The ground truth is {"task", "parameters", "entry"}, as the task's own scorer needs it. For every item the
    scorer must give the item's answer the same mark after the entry went through JSON. Tasks whose entries
    JSON cannot hold (Fractions, tuples that the scorer compares) are refused.

    Some tasks (in reasoning-gym 0.1.25: isomorphic_strings, knight_swap, polynomial_multiplication,
    ransom_note, word_ladder) iterate over sets of strings. They draw other items in another process unless
    PYTHONHASHSEED is set.
    """
    size, task = config.size or 0, config.task or ""
    first: dict[str, tuple[dict[str, Any], str]] = {}
    for drawn in itertools.count():
        if len(first) == size:
            return
        if drawn > 20 * size + CHUNK:
            raise DataError(
                f"task {task!r} gave {len(first):,} distinct questions in {drawn:,} draws, size is {size:,}",
                where="prompts.size",
                remedy=f"set prompts.size to {len(first):,} or less, or widen prompts.parameters",
            )
        chunk, index = divmod(drawn, CHUNK)
        if index == 0:
            seed = SEED_STRIDE * config.seed + CHUNK * chunk
            with _global_random(seed):
                data = _create(config, seed)
        source = f"{task}(seed={seed})[{index}]"
        with _global_random(seed + index):
            entry = _entry(data, index, source)
        question = entry["question"]
        if question in first:
            _check_repeat(data, entry, source, *first[question])
            notes["repeated"] += 1
            continue
        first[question] = entry, source
        ground_truth = {"task": task, "parameters": config.parameters, "entry": entry}
        yield Row([{"role": "user", "content": question}], source, ground_truth)


def _create(config: PromptsConfig, seed: int) -> Any:
    """Return the library's data set of the task, after a check of its parameters."""
    from dataclasses import fields

    require("reasoning_gym", "prompts.kind 'reasoning_gym'", where="prompts.kind")
    from reasoning_gym.factory import DATASETS, create_dataset

    task = config.task or ""
    if task not in DATASETS:
        raise ConfigError(
            f"unknown reasoning-gym task {task!r}", where="prompts.task", remedy=nearest(task, DATASETS)
        )
    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for name in config.parameters:
        if name in ("seed", "size"):
            raise ConfigError(
                f"{name!r} is not a parameter of the task",
                where=f"prompts.parameters.{name}",
                remedy=f"set prompts.{name}",
            )
        if name not in known:
            raise ConfigError(
                f"task {task!r} has no parameter {name!r}",
                where=f"prompts.parameters.{name}",
                remedy=nearest(name, known),
            )
    try:
        return create_dataset(task, **config.parameters, seed=seed, size=CHUNK)
    except Exception as error:  # tasks check by assert, ValueError, or by failing on a wrong type
        raise ConfigError(
            f"task {task!r} refuses {config.parameters}: {error or type(error).__name__}",
            where="prompts.parameters",
            remedy=f"its parameters are {', '.join(known)}",
        ) from error


def _entry(data: Any, index: int, source: str) -> dict[str, Any]:
    """Return an item after a round trip through JSON, if the task's scorer still gives it the same mark."""
    try:
        item = data[index]
    except Exception as error:  # any failure of the task's own code
        raise DataError(
            f"the task fails to draw an item: {type(error).__name__}: {error}",
            where=source,
            remedy="change prompts.parameters or prompts.seed",
        ) from error
    remedy = "choose another task; this one cannot be stored and scored later"
    try:
        if not _string_keys(item):
            raise TypeError("a key is not a string")
        entry: dict[str, Any] = json.loads(hashing.canonical_json(item))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the task's entry cannot be written as JSON: {error}", where=source, remedy=remedy
        ) from None
    answer = item["answer"]
    if answer is not None and data.score_answer(answer, item) != _score(data, answer, entry):
        raise DataError(
            "the task's scorer judges its own answer otherwise once the entry is written as JSON",
            where=source,
            remedy=remedy,
        )
    return entry


def _check_repeat(data: Any, entry: dict[str, Any], source: str, before: dict[str, Any], place: str) -> None:
    """Refuse equal questions with different ground truths: each must accept the answer of the other."""
    answer = entry["answer"]
    if answer is not None and _score(data, answer, before) != _score(data, answer, entry):
        raise DataError(
            f"the question of {place} comes again with another answer: {before['answer']!r} and {answer!r}",
            where=source,
            remedy="choose another prompts.seed, a smaller prompts.size, or other prompts.parameters",
        )


def _score(data: Any, answer: str, entry: dict[str, Any]) -> float | None:
    try:
        return float(data.score_answer(answer, entry))
    except Exception:  # two scorers that both fail agree
        return None


def _string_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _string_keys(below) for key, below in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_string_keys, value))


@contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """Seed Python's global generator inside the block: the task list_functions draws from it."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
