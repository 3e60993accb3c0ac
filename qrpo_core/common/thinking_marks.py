"""The marks that models write around their thinking."""

from __future__ import annotations

#: Marks that only models write: the opening and the closing mark of thinking.
UNMISTAKABLE = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)

#: All marks of models, with those that occur in ordinary text too.
THINKING = (*UNMISTAKABLE, ("<thinking>", "</thinking>"), ("<thought>", "</thought>"))

#: Every single mark.
MARKS = frozenset(mark for pair in THINKING for mark in pair)


def thinking_of(text: str, closes: str) -> tuple[str | None, str]:
    """An answer's thinking, without the closing mark, and the rest; (None, text) without thinking."""
    before, found, after = text.rpartition(closes)
    return (before, after) if found else (None, text)
