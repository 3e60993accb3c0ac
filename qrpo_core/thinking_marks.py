"""The marks that models write around their thinking, and which of them a tokenizer calls special."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Marks that none but a model writes: what opens the thinking and what closes it.
UNMISTAKABLE = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)

#: All that models write, those that stand in ordinary text too.
THINKING = (*UNMISTAKABLE, ("<thinking>", "</thinking>"), ("<thought>", "</thought>"))

#: Each of them by itself.
MARKS = frozenset(mark for pair in THINKING for mark in pair)


def thinking_of(text: str, closes: str) -> tuple[str | None, str]:
    """An answer's thinking, without what closes it, and the rest; None and the whole where it has none."""
    before, found, after = text.rpartition(closes)
    return (before, after) if found else (None, text)


def special_tokens(folder: Path) -> frozenset[str]:
    """The tokens of a model's directory that its tokenizer may call special. Loads no tokenizer.

    A token is among them if any of the tokenizer's files names it outside of the tokens that are said to be
    ordinary.
    """
    found = set(_strings(_read(folder / "special_tokens_map.json")))
    found.update(_strings(_read(folder / "tekken.json", "special_tokens")))
    settings = _read(folder / "tokenizer_config.json")
    if isinstance(settings, dict):
        added = settings.pop("added_tokens_decoder", None)
        settings.pop("chat_template", None)
        found.update(_strings(settings))
        found.update(_called_special(added.values() if isinstance(added, dict) else ()))
    found.update(_called_special(_read(folder / "tokenizer.json", "added_tokens") or ()))
    return frozenset(found)


def _called_special(added: Any) -> Iterator[str]:
    return (str(each["content"]) for each in added if isinstance(each, dict) and each.get("special"))


def _read(file: Path, key: str | None = None) -> Any:
    """A JSON file, or the value of its first such key, without the vocabulary behind it; None for none."""
    try:
        text = file.read_text(encoding="utf-8")
        if key is None:
            return json.loads(text)
        at = re.search(rf'"{key}"\s*:\s*', text)
        return json.JSONDecoder().raw_decode(text, at.end())[0] if at else None
    except (FileNotFoundError, ValueError):
        return None  # what loads the tokenizer says what is wrong with it


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
