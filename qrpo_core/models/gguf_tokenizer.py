"""Restore the pre-tokenizer that a GGUF file names (`tokenizer.ggml.pre`) and transformers may drop.

A byte-level vocabulary needs the pre-tokenizer that it was made with. transformers restores it for some names
and silently uses GPT-2's for the others; then digits after white space, or Chinese, get other ids than in
training. Names and patterns are those of llama.cpp (src/llama-vocab.cpp) and of the tokenizer.json files that
its converter lists in convert_hf_to_gguf_update.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Names that mean GPT-2's pre-tokenizer, the default of transformers.
_GPT2 = frozenset(
    {
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
        *("a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en"),
        *("jina-v2-es", "jina-v2-de", "jina-v2-code"),
    }
)
#: Names that mean single digits first, then GPT-2's pre-tokenizer.
_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
#: Other names: patterns applied one after the other, each isolating its matches.
_PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2"), _QWEN2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CJK,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
}


def restore_pre_tokenizer(tokenizer: Any, file: Path) -> dict[str, str]:
    """Give a converted tokenizer the pre-tokenizer that its GGUF file names.

    tokenizer : as transformers converted it; changed in place if it has the default pre-tokenizer.

    Returns `pre_tokenizer` (the name, or "" for none), and `note` if the pre-tokenizer may be wrong; {} for a
    tokenizer that is not byte-level.
    """
    from tokenizers import Regex, pre_tokenizers

    model, name = _named(file)
    if model != "gpt2":
        return {}
    facts = {"pre_tokenizer": name}
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) or name in _GPT2:
        return facts
    if name in _DIGITS:
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif name in _PATTERNS:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[name]]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        called = f"a split {name!r}, which is not known here" if name not in ("", "default") else "no split"
        note = (
            f"the GGUF names {called} (tokenizer.ggml.pre): text is split as by GPT-2, and numbers and other "
            "scripts may get other token ids than the model was trained with; take the model's own directory "
            "where that matters"
        )
        return facts | {"note": note}
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return facts


def _named(file: Path) -> tuple[str, str]:
    """The tokenizer model and pre-tokenizer that a GGUF file names, or ""."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    model, name = ("" if field is None else str(field.contents()) for field in found)
    return model, name
