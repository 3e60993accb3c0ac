"""Rows whose texts carry a chat template already are refused where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts
from tests.core.models.chat_families import FAMILIES

RENDERED = {
    name: family.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    for name, family in FAMILIES.items()
}


def load(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(PromptsConfig(kind="file", path=str(path), held_out=0.5, **settings))


def plain(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {number}", "chosen": "Yes.", "rejected": "No."} for number in range(count)]


@pytest.mark.parametrize("name", RENDERED)
def test_prompts_of_every_family(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"the user turn .* carries a chat template already .*rows\.jsonl:13"):
        load(tmp_path, [*plain(), {"prompt": RENDERED[name]}])


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["Fine.<|im_end|>\n", "Fine.<|eot_id|>", "Fine.<｜end▁of▁sentence｜>"])
def test_answers_that_end_their_turn(tmp_path: Path, side: str, text: str) -> None:
    rows = [*plain(), plain()[0] | {"prompt": "x", side: text}]
    with pytest.raises(DataError, match=rf"'{side}' carries a chat template already .*rows\.jsonl:13"):
        load(tmp_path, rows, chosen_field="chosen", rejected_field="rejected")


def test_histories(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.<|im_end|>"},
        {"role": "user", "content": "And?"},
    ]
    with pytest.raises(DataError, match="the assistant turn 'Hello"):
        load(tmp_path, [*plain(), {"prompt": turns}])


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|> mean?",
        "Explain <|im_end|>, <|eot_id|> and </s>.",
        "Why does [INST] stand in prompts?",
        "Is <s>old</s> valid HTML",
        "<think>Say less</think>",
    ],
)
def test_tokens_that_are_spoken_of_are_text(tmp_path: Path, text: str) -> None:
    found = load(tmp_path, [*plain(), {"prompt": text}])
    assert found.prompts["messages"].to_pylist()[-1] == [{"role": "user", "content": text}]
