"""Rows a second of the reward `model`, beside the same classifier scoring one row at a time.

    python benchmarks/reward_model.py [--output benchmarks/results/reward_model.json]

Two classifiers with a random head of one output: `demo`, the weights of the demo's model
(SmolLM2-135M-Instruct), and `small`, a random Llama of 4 layers and width 256 with its tokenizer; and, for a
GPU, `large`, a random one of 16 layers and width 2048 (about a billion weights). The rows
are answers of many lengths (log-normal, most 20 words, some 300) to short questions, made from a fixed seed.
Compared are each row by itself without padding, each row by itself padded to the longest, and
`ModelReward.score` with chat template, golden rows and sorting; loading is in none. Goal: at least 3 times
the rows a second of one prompt at a time, and equal scores (1e-4 in float32). On a CPU one row of the 135M
model already keeps a core's arithmetic two thirds busy: there, most of the gain is that of padding less.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _result import about, publish
from _smollm2 import SMOLLM2

from qrpo_core.config import ModelConfig
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.models.loading import convert_gguf
from qrpo_core.models.source import resolve_model
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.model.reward import ModelReward

#: Of the random classifiers.
SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
}
WORDS = [
    "the",
    "a",
    "result",
    "of",
    "and",
    "is",
    "number",
    "seven",
    "because",
    "we",
    "add",
    "then",
    "take",
    "what",
    "remains",
    "so",
    "answer",
    "equals",
]


def write_classifiers(model: str, names: list[str], folder: Path) -> dict[str, Path]:
    """The classifiers `names`, by name."""
    source = resolve_model(ModelConfig(path=model))
    policy = folder / "policy"
    if source.needs_conversion:
        convert_gguf(source, "float32", policy)
    else:
        policy = source.directory
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    for name in names:
        torch.manual_seed(0)
        if name == "demo":
            classifier = transformers.AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
        else:
            shape = transformers.LlamaConfig(
                **SHAPES[name], vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id
            )
            classifier = transformers.LlamaForSequenceClassification(shape)
        classifier.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in names}


def rows(count: int) -> list[RewardRequest]:
    """Answers to short questions; lengths log-normal around 20 words, at most 300."""
    chance = random.Random(0)
    made = []
    for row in range(count):
        words = min(300, max(1, round(chance.lognormvariate(3.0, 0.9))))
        text = " ".join(chance.choice(WORDS) for _ in range(words))
        made.append(RewardRequest(f"p{row}", 0, (("user", f"What is {row} + 4?"),), text, None))
    return made


def measure(path: Path, dtype: str, requests: list[RewardRequest], batch_tokens: int) -> dict[str, Any]:
    """The three ways over the same rows, each after rows that are not counted."""
    reward = ModelReward(ModelRewardConfig(path=str(path), dtype=dtype, batch_tokens=batch_tokens))
    reward.score(requests[:8])
    texts, classifier = reward._models()
    longest = max(len(texts.encode(request)) for request in requests)
    seconds = {}
    started = time.perf_counter()
    alone = [float(classifier.padded([texts.encode(request)], "right")[0]) for request in requests]
    seconds["one_at_a_time"] = time.perf_counter() - started
    padded = requests[:: max(1, len(requests) // 16)]
    started = time.perf_counter()
    for request in padded:
        classifier.padded([texts.encode(request)], "right", longest)
    seconds["one_at_a_time_padded"] = (time.perf_counter() - started) * len(requests) / len(padded)
    classifier.side = None  # the golden rows are part of the batched time
    started = time.perf_counter()
    scores = reward.score(requests)
    seconds["batched"] = time.perf_counter() - started
    return {
        "device": str(classifier._device),
        "arithmetic": str(classifier._dtype).removeprefix("torch."),
        "tokens": sum(len(texts.encode(request)) for request in requests),
        "longest": longest,
        "rows_per_second": {name: round(len(requests) / value, 2) for name, value in seconds.items()},
        "times_one_at_a_time": round(seconds["one_at_a_time"] / seconds["batched"], 2),
        "times_one_at_a_time_padded": round(seconds["one_at_a_time_padded"] / seconds["batched"], 2),
        "largest_difference": max(abs(a - float(s.reward or 0)) for a, s in zip(alone, scores, strict=True)),
        "spread_of_scores": max(alone) - min(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="kept with the result, such as what else was running")
    parser.add_argument("--model", default=SMOLLM2, help="a causal model whose weights are used")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--classifiers", nargs="+", choices=("demo", *SHAPES), default=["small", "demo"])
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    head = about(
        "ModelReward.score beside one row at a time",
        goal={"times": 3.0, "largest_difference_float32": 1e-4},
        note=arguments.note,
        rows=arguments.rows,
        threads=torch.get_num_threads(),
        versions={"transformers": transformers.__version__},
    )
    with tempfile.TemporaryDirectory(prefix="qrpo-reward-model-") as scratch:
        paths = write_classifiers(arguments.model, arguments.classifiers, Path(scratch))
        requests = rows(arguments.rows)
        results = {
            f"{name}, {dtype}": measure(paths[name], dtype, requests, arguments.batch_tokens)
            for name in arguments.classifiers
            for dtype in arguments.dtypes
        }
    publish(head | results, arguments.output)


if __name__ == "__main__":
    main()
