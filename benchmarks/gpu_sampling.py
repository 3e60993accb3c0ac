"""Sampling with the transformers engine on a GPU beside `generate`: tokens/s, and rows equal a second time.

    python benchmarks/gpu_sampling.py [--model 1b] [--output benchmarks/results/gpu/sampling.json]
    python benchmarks/gpu_sampling.py --model tiny          # anywhere: shows that it runs

A Llama of random weights (_random_model.py) draws several completions a prompt, all of full length. The first
batch size is drawn in turn with one `generate` of as many rows a call (padded on the left, without seeds), a
ratio is the median over the rounds; other sizes are compared with the median of that `generate`. 0 stands for
the engine's own choice. The same requests are drawn again, and a part of them alone. On a CPU every row must
be the same; on a GPU the engine says that it is not exact, and the share of equal rows is given.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _random_model import SHAPES, chosen, gpu_options, random_rows, write_random_model
from _result import about, publish, versions
from _steps import synchronize
from transformers import AutoModelForCausalLM, GenerationConfig

from qrpo_core.common.hashing import sample_seed
from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.precision import compute_dtype, pick_device


def requests(name: str, prompts: int, samples: int) -> list[SampleRequest]:
    """`samples` of each of so many prompts."""
    rows = random_rows(prompts, SHAPES[name]["vocab_size"])
    return [
        SampleRequest(f"p{place}", index, prompt, sample_seed(0, f"p{place}", index))
        for place, (prompt, _) in enumerate(rows)
        for index in range(samples)
    ]


def equal_share(one: list[Completion], other: list[Completion]) -> float:
    """The share of rows of equal tokens."""
    same = [a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)]
    return round(sum(same) / len(same), 4)


class Generate:
    """transformers' own `generate` on the same requests."""

    def __init__(self, folder: Path) -> None:
        device = pick_device()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype("bfloat16", device))
        self._model = model.to(device).eval()

    def draw(self, asked: list[SampleRequest], new_tokens: int, size: int) -> float:
        """Draw all requests, `size` a call; returns tokens/s."""
        settings = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens, pad_token_id=0
        )
        began, tokens = time.perf_counter(), 0
        for at in range(0, len(asked), size):
            rows = [request.prompt_token_ids for request in asked[at : at + size]]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            ids, mask = (each.to(self._model.device) for each in (ids, mask))
            with torch.inference_mode():
                drawn = self._model.generate(ids, attention_mask=mask, generation_config=settings)
            tokens += drawn[:, width:].numel()
        synchronize()
        return tokens / (time.perf_counter() - began)


def drawn_by(
    engine: TransformersEngine, asked: list[SampleRequest], params: SamplingParams
) -> tuple[float, list[Completion]]:
    """Tokens/s, and the rows."""
    began = time.perf_counter()
    rows = engine.sample(asked, params)
    synchronize()
    return sum(len(row.token_ids) for row in rows) / (time.perf_counter() - began), rows


def measure(
    given: argparse.Namespace, head: dict[str, Any], folder: Path, asked: list[SampleRequest]
) -> None:
    """Every batch size; the result is written as it grows."""
    params = SamplingParams(1.0, 1.0, given.new_tokens, ())
    sizes: dict[str, dict[str, Any]] = {}
    theirs: list[float] = []
    for number, size in enumerate(given.batch_sizes):
        engine = TransformersEngine(folder, **({"batch_size": size} if size else {}))
        warm = time.perf_counter()
        engine.sample(asked, params)  # captures what the measured rounds use
        found: dict[str, Any] = {"warm_up_seconds": round(time.perf_counter() - warm, 1)}
        other = Generate(folder) if number == 0 else None
        if other is not None:
            other.draw(asked[: size or 32], 8, size or 32)
        rates: list[float] = []
        rows: list[Completion] = []
        for _ in range(given.rounds):
            rate, rows = drawn_by(engine, asked, params)
            rates.append(rate)
            if other is not None:
                theirs.append(other.draw(asked, given.new_tokens, size or 32))
        found["tokens_per_second"] = round(statistics.median(rates), 1)
        found["generate_tokens_per_second"] = round(statistics.median(theirs), 1)
        if other is None:
            found["ours_to_generate"] = round(statistics.median(rates) / statistics.median(theirs), 3)
        else:
            ratios = [a / b for a, b in zip(rates, theirs, strict=True)]
            found["ours_to_generate"] = round(statistics.median(ratios), 3)
            found["equal_a_second_time"] = equal_share(drawn_by(engine, asked, params)[1], rows)
            found["equal_in_other_company"] = equal_share(drawn_by(engine, asked[::3], params)[1], rows[::3])
        found |= {"exact": engine.exact, "engine": engine.name}
        engine.close()
        del other
        sizes["its own choice" if size == 0 else str(size)] = found
        result = head | {"rows": len(asked), "new_tokens": given.new_tokens, "batch_sizes": sizes}
        publish(result, given.output, shown=f"batch size {size}: {found}")


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 0])
    given = parser.parse_args()
    name, _ = chosen(given.model)
    head = about(
        "sampling with the transformers engine beside generate",
        goals={"ours_to_generate": 1.0},
        model=name,
        versions=versions("transformers"),
    )
    asked = requests(name, given.prompts, given.samples)
    with tempfile.TemporaryDirectory(prefix="qrpo-gpu-sampling-") as scratch:
        folder = write_random_model(name, Path(scratch) / "model")
        measure(given, head, folder, asked)


if __name__ == "__main__":
    main()
