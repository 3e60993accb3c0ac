"""Quarantine of damaged manifests: planning no longer sees them, and they stay for inspection.

``quarantine/<step>/<recipe key>/<name>.json`` holds the manifest (its text, if it is no JSON any more), the
reason and the time. The data objects that it names stay where they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

from qrpo_core.common.errors import MissingError
from qrpo_core.store.backends.interface import Objects

_logger = logging.getLogger("qrpo.store")


@dataclass(frozen=True)
class Quarantined:
    """One quarantined manifest.

    step, key : of its recipe. block : block id, or "manifest" for an artifact.
    rows : of the block; 0 for an artifact, and for an unreadable manifest.
    entry : object key that the manifest had. path, size : object key and bytes of the record.
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


def quarantine(objects: Objects, entry: str, why: str, is_same: Callable[[bytes], bool]) -> str:
    """Move the manifest `entry` to ``quarantine/``; returns the new key, "" if there is nothing to move.

    is_same : whether these bytes are the manifest that was found damaged; a new one by somebody else stays.
    """
    try:
        content = objects.read(entry)
    except MissingError:
        return ""  # somebody else was faster
    if not is_same(content):
        return ""
    _, step, key, *_, name = entry.split("/")
    record = {
        "entry": entry,
        "why": why,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": _json_or_text(content),
    }
    stem = f"quarantine/{step}/{key}/{name.removesuffix('.json')}"
    for number in count(1):
        path = f"{stem}.json" if number == 1 else f"{stem}-{number}.json"
        if objects.put_if_absent(path, json.dumps(record).encode()):
            break
        if json.loads(objects.read(path))["manifest"] == record["manifest"]:
            break  # recorded before, by a process that did not come to delete the manifest
    objects.delete(entry)
    _logger.warning("Quarantined %s/%s: %s", objects.url, entry, why)
    return path


def list_quarantined(objects: Objects) -> Iterator[Quarantined]:
    """Every quarantined manifest, by path."""
    for each in objects.entries("quarantine/"):
        _, step, key, name = each.key.split("/")
        record = json.loads(objects.read(each.key))
        manifest = record["manifest"]
        rows = manifest.get("rows", 0) if isinstance(manifest, dict) else 0
        block = name.removesuffix(".json").partition("-")[0]
        why = (record["entry"], record["why"], record["when"])
        yield Quarantined(step, key, block, rows, *why, each.key, each.size)


def _json_or_text(content: bytes) -> Any:
    text = content.decode(errors="backslashreplace")
    try:
        return json.loads(text)
    except ValueError:
        return text
