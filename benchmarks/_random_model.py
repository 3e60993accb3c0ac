"""A causal model of random weights, for speed at sizes that no installed package brings."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from _result import gpu, options

#: Shapes by name: `tiny` shows that a script runs, `135m` is that of SmolLM2-135M, `1b` that of Llama 3.2 1B
#: (1.24 billion weights).
SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # of 32: vLLM has no smaller ones on a CPU
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
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
    """The shape that is asked for, and the GPU, None without one; exits if nothing is to be run."""
    found = gpu()
    if model is None and found is None:
        print("no GPU: nothing was measured; --model tiny shows that this script runs")
        sys.exit()
    return model or "1b", found


def write_random_model(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """A Llama of a shape in SHAPES with weights from seed 0, and a tokenizer that only names its tokens.

    Returns its directory: `folder`, or the one of that name in $QRPO_RANDOM_MODELS, if that is there.
    """
    kept = os.environ.get("QRPO_RANDOM_MODELS")
    if kept and (Path(kept) / name / "config.json").is_file():
        return Path(kept) / name
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = SHAPES[name]
    config = LlamaConfig(**shape, max_position_embeddings=LONGEST, tie_word_embeddings=True, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    words = {f"<{token}>": token for token in range(shape["vocab_size"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<0>", eos_token="<1>").save_pretrained(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder)  # last: config.json says that it is whole
    del model
    torch.cuda.empty_cache()
    return folder


def random_pairs(count: int, vocab: int, shortest: int, longest: int) -> list[dict[str, list[int]]]:
    """Pairs of completions of random tokens behind a prompt; the same ones every time.

    Prompts take a part of the lengths, log-normal around 170 of 64 to 1000 tokens, completions the rest.
    """
    rng = np.random.default_rng(0)
    scale = longest / 1000
    prompts = np.clip(rng.lognormal(np.log(170 * scale), 0.8, count), shortest / 2, 400 * scale)
    rest = np.clip(rng.lognormal(np.log(250 * scale), 0.8, (2, count)), shortest / 2, 600 * scale)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: rng.integers(2, vocab, int(size)).tolist() for name, size in zip(names, sizes, strict=True)}
        for sizes in zip(prompts, *rest, strict=True)
    ]


def random_rows(count: int, vocab: int) -> list[tuple[Ids, Ids]]:
    """Prompts and completions of random tokens, 64 to 1024 of them a row; the same ones every time."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt, completion = np.clip(rng.lognormal(4.9, 0.8, 2), 32, 512).astype(int)
        row = tuple(int(token) for token in rng.integers(2, vocab, prompt + completion))
        made.append((row[:prompt], row[prompt:]))
    return made


if __name__ == "__main__":
    for shape in sys.argv[2:]:
        print(write_random_model(shape, Path(sys.argv[1]) / shape))
