"""The pages of the documents, and the commands in them, for tests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deployments" / "README.md",
    *DOCS.rglob("*.md"),
]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str = "") -> list[str]:
    """Contents of the page's fenced blocks of a language."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for kind, text in found if kind == language]


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of every command of a program; those with placeholders are left out."""
    for page in PAGES:
        for line in (line for block in blocks(page) for line in block.splitlines()):
            words = line.removeprefix("$ ")
            if words.startswith(f"{program} ") and "…" not in words and "[" not in words.split("#")[0]:
                yield name(page), shlex.split(words, comments=True)[1:]
