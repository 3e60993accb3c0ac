"""How a GGUF's tokenizer splits text before its merges: `tokenizer.ggml.pre`, which its conversion may drop.

A byte-level vocabulary belongs to one way of splitting. transformers sets that of some names and leaves the
others with GPT-2's, without a word; then digits after white space, or Chinese, get other ids than the model
was trained with. The names and their splits are those of llama.cpp (src/llama-vocab.cpp) and of the
tokenizer.json files that its converter names in convert_hf_to_gguf_update.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Names whose split is GPT-2's, which every byte-level tokenizer of transformers begins with.
_GPT2 = frozenset(
    {
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
        *("a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en"),
        *("jina-v2-es", "jina-v2-de", "jina-v2-code"),
    }
)
#: Names whose split takes every digit by itself first, then GPT-2's.
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
#: Further names: patterns that isolate their matches, one after the other.
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


def honour_split(tokenizer: Any, file: Path) -> dict[str, str]:
    """Give a converted tokenizer the split that its GGUF names; the facts: what it names and what was done.

    tokenizer : as transformers converted it; changed in place where its split is only what they begin with.

    Returns `pre_tokenizer` (the name, or "" for none), and `note` where the split is not known to be right.
    A tokenizer that is no byte-level one has neither: nothing is split there.
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
    """What a GGUF says of its tokenizer: the model, and the split or ""."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    model, name = ("" if field is None else str(field.contents()) for field in found)
    return model, name
