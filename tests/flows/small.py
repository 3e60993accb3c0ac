"""A small experiment, of which tests of runs change what they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main


def call(*arguments: object) -> int:
    """The exit status of `qrpo` with these arguments."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def small(model: Path, store: Path) -> dict[str, Any]:
    """Settings as a file has them: 20 prompts, 4 references each, the fake engine, short answers are best."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "kind": "template",
            "templates": ["Say {w}"],
            "words": {"w": [f"item {number}" for number in range(20)]},
            "size": 20,
        },
        "sampling": {"engine": "fake", "references_per_prompt": 4, "max_new_tokens": 12},
        "reward": {"kind": "length", "max_words": 1},
        "store": {"path": str(store)},
    }
