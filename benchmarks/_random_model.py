"""A causal model of random weights, for speed at sizes that no installed package brings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from _result import options

#: Shapes by name: `tiny` shows that a script runs, `1b` is that of Llama 3.2 1B (1.24 billion weights).
SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
#: Positions of every shape.
LONGEST = 2048

Ids = tuple[int, ...]


def gpu_options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that wants a GPU, with `--model`."""
    parser = options(description)
    parser.add_argument("--model", choices=SHAPES, help="default: 1b on a GPU; without one, nothing is run")
    return parser


def chosen(model: str | None) -> tuple[str, str | None]:
    """The shape that is asked for, and the GPU's name, None without one; exits if nothing is to be run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if model is None and gpu is None:
        print("no GPU: nothing was measured; --model tiny shows that this script runs")
        sys.exit()
    return model or "1b", gpu


def write_random_model(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """A Llama of a shape in SHAPES with weights from seed 0, and a tokenizer that only names its tokens."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=LONGEST, tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {f"<{token}>": token for token in range(shape["vocab_size"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<0>", eos_token="<1>").save_pretrained(folder)
    return folder


def random_rows(count: int, vocab: int) -> list[tuple[Ids, Ids]]:
    """Prompts and completions of random tokens, 64 to 1024 of them a row; the same ones every time."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt, completion = np.clip(rng.lognormal(4.9, 0.8, 2), 32, 512).astype(int)
        row = tuple(int(token) for token in rng.integers(2, vocab, prompt + completion))
        made.append((row[:prompt], row[prompt:]))
    return made
