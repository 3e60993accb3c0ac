"""Reference log-probs: rows a second beside one prompt at a time, on the same rows and model.

    python benchmarks/reference_logprobs.py [--rows 96] [--output benchmarks/results/reference_logprobs.json]
    python benchmarks/reference_logprobs.py --random-model 1b --rows 256   # for a GPU

SmolLM2-135M-Instruct (the demo's model) on pieces of this project's documents, cut into prompts and
completions of many lengths (log-normal; most completions some 40 tokens, a few hundreds). Compared are

padded  each row by itself, padded to the longest, all logits, log-softmax: a script with a fixed length
alone   each row by itself, unpadded, all logits, log-softmax (in the first turn only)
ours    `TransformersEngine.logprobs`: packed passes, logits of completion tokens only, in chunks

in turns, in one process and in the same arithmetic; a ratio is the median over the turns. Goal: on a GPU 6
times the rows a second of one padded prompt at a time, on a CPU 3 times, equal to 1e-3 nats in float32.

With --random-model the model is a Llama of that size with random weights, and the rows are random tokens (64
to 1024 a row). On CUDA both sides compute in bfloat16, and two orders of the same sums differ by more than
1e-3 nats: then each way's error against float32 weights and arithmetic, a row at a time, is given as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _random_model import SHAPES, random_rows, write_random_model
from _result import about, gpu, publish, versions
from _smollm2 import SMOLLM2

from qrpo_core.config import ModelConfig
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.chat import Chat
from qrpo_core.models.loading import convert_gguf, load_model
from qrpo_core.models.precision import pick_device
from qrpo_core.models.source import resolve_model

ROOT = Path(__file__).parents[1]
#: Rows whose errors against float32 are taken.
ERROR_ROWS = 64


def rows_of(count: int, folder: Path) -> list[LogprobRequest]:
    """Prompts and completions cut out of the documents; the same ones every time."""
    chat = Chat.load(folder)
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = chat.encode_completion(text)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = int(np.clip(rng.lognormal(3.7, 0.7), 8, 400))
        completion = int(np.clip(rng.lognormal(3.7, 0.9), 4, 500))
        start = int(rng.integers(0, len(tokens) - prompt - completion - 1))
        middle = start + prompt
        rows.append(LogprobRequest(tokens[start:middle], tokens[middle : middle + completion]))
    return rows


def one_at_a_time(model: Any, rows: list[LogprobRequest], width: int | None) -> list[float]:
    """The plain way, a row a pass; padded to `width` where it is given."""
    device = next(model.parameters()).device
    sums = []
    for row in rows:
        ids = [*row.prompt_token_ids, *row.token_ids]
        padding = (width or len(ids)) - len(ids)
        inputs = torch.tensor([ids + [0] * padding], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * padding], device=device)
        with torch.inference_mode():
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[0, : len(ids) - 1]
        picked = logits.float().log_softmax(-1).gather(-1, inputs[0, 1 : len(ids), None])[:, 0]
        sums.append(float(picked[len(row.prompt_token_ids) - 1 :].sum()))
    return sums


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def prepare(random_model: str | None, count: int, folder: Path) -> tuple[Path, list[LogprobRequest]]:
    """The model's directory and the rows."""
    if random_model is None:
        convert_gguf(resolve_model(ModelConfig(path=SMOLLM2)), "float32", folder)
        return folder, rows_of(count, folder)
    made = random_rows(count, SHAPES[random_model]["vocab_size"])
    rows = [LogprobRequest(prompt, completion) for prompt, completion in made]
    return write_random_model(random_model, folder), rows


def measure(count: int, turns: int, random_model: str | None, *, without_alone: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = prepare(random_model, count, Path(scratch) / "model")
        # On an accelerator both sides compute in bfloat16 where it is native; float32 here.
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        engine = TransformersEngine(folder, dtype)
        model = load_model(folder, dtype)
        model.to(pick_device())
        width = max(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
        ways = {
            "padded": lambda: one_at_a_time(model, rows, width),
            "alone": lambda: one_at_a_time(model, rows, None),
            "ours": lambda: engine.logprobs(rows),
        }
        if without_alone:
            del ways["alone"]
        engine.logprobs(rows if torch.cuda.is_available() else rows[:4])  # a GPU compiles by shape
        one_at_a_time(model, rows[:2], None)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        sums: dict[str, Any] = {}
        for turn in range(turns):
            for name, way in ways.items():
                if turn and name == "alone":
                    continue
                spent, sums[name] = timed(way)
                seconds[name].append(spent)
                print(f"turn {turn}: {name} {spent:.1f} s", file=sys.stderr)
        errors = None if dtype == "float32" else errors_in_float32(folder, rows, sums)
    lengths = [len(row.prompt_token_ids) + len(row.token_ids) for row in rows]
    return {
        "arithmetic": engine.name,
        "rows": len(rows),
        "tokens": sum(lengths),
        "completion_tokens": sum(len(row.token_ids) for row in rows),
        "longest_row": width,
        "rows_per_second": {name: round(count / statistics.median(s), 2) for name, s in seconds.items()},
        "ours_to_padded": ratio(seconds["padded"], seconds["ours"]),
        "ours_to_alone": ratio(seconds["alone"], seconds["ours"][:1]) if "alone" in ways else None,
        "largest_difference_nats": {
            name: float(np.abs(np.asarray(sums[name]) - np.asarray(sums["ours"])).max())
            for name in ways
            if name != "ours"
        },
        "errors_against_float32_nats": errors,
    }


def errors_in_float32(folder: Path, rows: list[LogprobRequest], sums: dict[str, Any]) -> dict[str, Any]:
    """How far each way's first sums are from those of float32 weights and arithmetic, a row at a time."""
    model = load_model(folder, "float32").to(pick_device())
    exact = np.asarray(one_at_a_time(model, rows[:ERROR_ROWS], None))
    errors = {name: np.abs(np.asarray(found[:ERROR_ROWS]) - exact) for name, found in sums.items()}
    return {
        name: {"mean": float(error.mean()), "largest": float(error.max())} for name, error in errors.items()
    }


def ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    each = [one / other for one, other in zip(theirs, ours, strict=True)]
    return {"median": round(statistics.median(each), 2), "range": [round(min(each), 2), round(max(each), 2)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--random-model", choices=SHAPES, help="instead of SmolLM2: a model of that size")
    parser.add_argument("--without-alone", action="store_true", help="without the way alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    goals = {"ours_to_padded": 6.0} if gpu() else {"ours_to_padded": 3.0, "largest_difference_nats": 1e-3}
    head = about(
        "reference log-probs beside one row at a time",
        goals=goals,
        model=options.random_model or SMOLLM2,
        versions=versions("transformers"),
    )
    found = measure(options.rows, options.turns, options.random_model, without_alone=options.without_alone)
    publish(head | found, options.output)


if __name__ == "__main__":
    main()
