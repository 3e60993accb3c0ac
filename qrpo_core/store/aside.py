"""Setting damaged things aside: out of the way of planning, kept for whoever wants to know.

``aside/<step>/<recipe key>/<name>.json`` holds the manifest that was taken away (its text, where it was not
JSON any more), why and when; the data objects that it named stay where they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

from qrpo_core.errors import MissingError
from qrpo_core.store.interface import Objects

_logger = logging.getLogger("qrpo.store")


@dataclass(frozen=True)
class Aside:
    """One thing that was set aside.

    step, key : of its recipe. block : block id, or "manifest" for an artifact.
    rows : of the block; 0 for an artifact, and where its manifest could not be read.
    entry : object key of the manifest that was taken away. path, size : object key and bytes of the record.
    """

    step: str
    key: str
    block: str
    rows: int
    entry: str
    why: str
    when: str
    path: str
    size: int


def set_aside(objects: Objects, entry: str, why: str, judged: Callable[[bytes], bool]) -> str:
    """Move the index entry `entry` to ``aside/``; returns the new key, "" if there was nothing to move.

    judged : whether these bytes are the entry that was found wanting; another's fresh one is left alone.
    """
    try:
        content = objects.read(entry)
    except MissingError:
        return ""  # somebody else was faster
    if not judged(content):
        return ""
    _, step, key, *_, name = entry.split("/")
    record = {
        "entry": entry,
        "why": why,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": _readable(content),
    }
    stem = f"aside/{step}/{key}/{name.removesuffix('.json')}"
    for number in count(1):
        path = f"{stem}.json" if number == 1 else f"{stem}-{number}.json"
        if objects.create(path, json.dumps(record).encode()) or _same(objects, path, record):
            break
    objects.delete(entry)
    _logger.warning("Set aside %s/%s: %s", objects.url, entry, why)
    return path


def list_aside(objects: Objects) -> Iterator[Aside]:
    """Everything that was set aside, by path."""
    for each in objects.entries("aside/"):
        _, step, key, name = each.key.split("/")
        record = json.loads(objects.read(each.key))
        manifest = record["manifest"]
        rows = manifest.get("rows", 0) if isinstance(manifest, dict) else 0
        block = name.removesuffix(".json").partition("-")[0]
        told = (record["entry"], record["why"], record["when"])
        yield Aside(step, key, block, rows, *told, each.key, each.size)


def _readable(content: bytes) -> Any:
    text = content.decode(errors="backslashreplace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _same(objects: Objects, path: str, record: dict[str, Any]) -> bool:
    """Whether it was put there before, by one that did not come to take the entry away."""
    return bool(json.loads(objects.read(path))["manifest"] == record["manifest"])
