"""Repeated keys of YAML are refused, with both lines; anchors and merge keys mean what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.reading import load_experiment

GOOD = """model: {path: m}
prompts: {kind: file, path: p.jsonl}
reward: {kind: length, max_words: 5}
"""


def load(folder: Path, text: str, *overrides: str) -> object:
    (folder / "e.yaml").write_text(text)
    return load_experiment(folder / "e.yaml", list(overrides))


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("sampling: {seed: 1}\nsampling: {temperature: 0.7}\n", "sampling", 4, 5),
        ("sampling:\n  seed: 1\n  temperature: 0.5\n  seed: 2\n", "seed", 5, 7),
        ("sampling: {seed: 1, seed: 1}\n", "seed", 4, 4),
        ("sampling: {seed: 1, 'seed': 1}\n", "seed", 4, 4),
        (
            "evaluation:\n  judges:\n    a: {kind: sentiment}\n    a: {kind: length, max_words: 3}\n",
            "a",
            6,
            7,
        ),
        ("training:\n  lora_targets:\n  - {x: 1,\n     x: 2}\n", "x", 6, 7),
        ("model: {path: n}\n", "model", 1, 4),
    ],
)
def test_a_repeated_key_is_refused_with_its_lines(
    tmp_path: Path, text: str, key: str, first: int, second: int
) -> None:
    message = rf"key '{key}' occurs twice: first in line {first} \[.*e\.yaml:{second}\]: keep one"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD + text)


def test_a_repeated_key_in_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key 'seed' occurs twice \[--set sampling"):
        load(tmp_path, GOOD, "sampling={seed: 1, seed: 2}")


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    text = (
        "model: {path: m}\nprompts: {kind: file, path: p.jsonl}\n"
        "reward: &short {kind: length, min_words: 2, max_words: 5}\n"
        "evaluation:\n  judges:\n    long: {<<: *short, max_words: 50}\n    longer:\n"
        "      <<: *short\n      min_words: 9\n      max_words: 90\n    same: *short\n"
    )
    judges = load(tmp_path, text).evaluation.judges  # type: ignore[attr-defined]
    assert [(each.min_words, each.max_words) for each in judges.values()] == [(2, 50), (9, 90), (2, 5)]


def test_a_merged_mapping_may_be_merged_into_another_and_used_again(tmp_path: Path) -> None:
    text = GOOD + (
        "evaluation:\n  judges:\n    a: &a {kind: length, min_words: 1, max_words: 3}\n"
        "    b: &b {<<: *a, min_words: 2}\n    c: {<<: *b, min_words: 3}\n    d: *b\n"
    )
    judges = load(tmp_path, text).evaluation.judges  # type: ignore[attr-defined]
    assert [each.min_words for each in judges.values()] == [1, 2, 3, 2]
