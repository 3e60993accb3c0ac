"""Find a tokenizer's special tokens; decoded text lacks the marks of thinking among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def special_tokens(folder: Path) -> frozenset[str]:
    """The tokens that the tokenizer in a model's directory may call special. Loads no tokenizer.

    It includes every token that one of the tokenizer's files names, except tokens marked as not special.
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
    """The value of a JSON file, or of its first `key` (without reading on); None if there is none."""
    try:
        text = file.read_text(encoding="utf-8")
        if key is None:
            return json.loads(text)
        at = re.search(rf'"{key}"\s*:\s*', text)
        return json.JSONDecoder().raw_decode(text, at.end())[0] if at else None
    except (FileNotFoundError, ValueError):
        return None  # loading the tokenizer reports what is wrong


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
