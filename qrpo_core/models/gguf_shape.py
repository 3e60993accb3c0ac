"""The shape of a model in a .gguf file, from its metadata; no tensor is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qrpo_core.models.memory import ModelShape


def gguf_shape(file: Path) -> ModelShape | None:
    """The shape; None where the package gguf is missing, or the layers have no formula."""
    if importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields: dict[str, Any] = reader.fields

    def number(name: str) -> int | None:
        found = fields.get(f"{family}.{name}")
        return None if found is None else int(found.contents())

    family = str(fields["general.architecture"].contents())
    tensors = {tensor.name for tensor in reader.tensors}
    return ModelShape.of_config(
        {
            "model_type": family,
            "num_hidden_layers": number("block_count"),
            "hidden_size": number("embedding_length"),
            "num_attention_heads": number("attention.head_count"),
            "num_key_value_heads": number("attention.head_count_kv"),
            "head_dim": number("attention.key_length"),
            "intermediate_size": number("feed_forward_length"),
            "vocab_size": number("vocab_size") or len(fields["tokenizer.ggml.tokens"].data),
            "num_local_experts": number("expert_count"),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
    )
