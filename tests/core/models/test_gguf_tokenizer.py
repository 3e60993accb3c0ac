"""The split of text that a GGUF names: set where the conversion drops it, noted where nobody knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qrpo_core.models.gguf_tokenizer import restore_pre_tokenizer

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path, pre: str | None, model: str = "gpt2") -> Path:
    """A file with a tokenizer's names alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tokenizer() -> Any:
    """Byte-level, split as by GPT-2: what transformers converts every such vocabulary to at first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def pieces(made: Any, text: str) -> list[str]:
    return [text[slice(*span)] for _, span in made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


TEXT = "is  12345, isn't it\n\n 你好x"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["is", " ", " 12345", ",", " isn", "'t", " it", "\n\n", " 你好x"]),
        ("smollm", ["is", "  ", "1", "2", "3", "4", "5", ",", " isn", "'t", " it", "\n\n", " 你好x"]),
        ("qwen2", ["is", " ", " ", "1", "2", "3", "4", "5", ",", " isn", "'t", " it", "\n\n", " 你好x"]),
        ("llama-bpe", ["is", " ", " ", "123", "45", ",", " isn", "'t", " it", "\n\n", " 你好x"]),
        ("deepseek-v3", ["is", "  ", "123", "45", ",", " isn", "'t", " it", "\n\n", " ", "你好", "x"]),
        ("deepseek-llm", ["is", "  ", "1", "2", "3", "4", "5", ",", " isn", "'", "t", " it"]),
        ("deepseek-coder", ["is", "  ", "1", "2", "3", "4", "5", ",", " isn", "'", "t", " it"]),
    ],
)
def test_known_names_are_honoured(tmp_path: Path, pre: str, expected: list[str]) -> None:
    made = tokenizer()
    assert restore_pre_tokenizer(made, write_gguf(tmp_path / "m.gguf", pre)) == {"pre_tokenizer": pre}
    assert pieces(made, TEXT)[: len(expected)] == expected
    assert made.decode(made(TEXT)["input_ids"]) == TEXT


@pytest.mark.parametrize(("pre", "called"), [("of-tomorrow", "'of-tomorrow'"), (None, "no split")])
def test_others_are_noted(tmp_path: Path, pre: str | None, called: str) -> None:
    made = tokenizer()
    facts = restore_pre_tokenizer(made, write_gguf(tmp_path / "m.gguf", pre))
    assert facts["pre_tokenizer"] == (pre or "")
    assert called in facts["note"]
    assert pieces(made, "a 12") == ["a", " 12"]


def test_a_split_that_was_honoured_already_is_left_alone(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    made = tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("x"), "isolated")
    restore_pre_tokenizer(made, write_gguf(tmp_path / "m.gguf", "smollm"))
    assert pieces(made, "1x2") == ["1", "x", "2"]


def test_sentencepiece_has_no_split(tmp_path: Path) -> None:
    assert restore_pre_tokenizer(tokenizer(), write_gguf(tmp_path / "m.gguf", "default", model="llama")) == {}


@pytest.mark.slow
def test_the_real_file(smollm2: Path) -> None:
    """SmolLM2's digits stand alone, so white space before them stays together."""
    from qrpo_core.models.loading import load_tokenizer

    made = load_tokenizer(smollm2)
    assert made.convert_ids_to_tokens(made("a  12\n\n 3")["input_ids"]) == ["a", "ĠĠ", "1", "2", "ĊĊĠ", "3"]
