"""Sampling with the transformers engine on a GPU: tokens/s, and how many rows are the same a second time.

    python benchmarks/gpu_sampling.py [--model 1b] [--output benchmarks/results/gpu_sampling.json]
    python benchmarks/gpu_sampling.py --model tiny          # anywhere: shows that it runs

A Llama of random weights (_random_model.py) draws several completions a prompt, all of full length. The same
requests are drawn again, with other batch sizes, and a part of them alone. On a CPU every row must be the
same; on a GPU the engine says that it is not exact, and the share of equal rows is given.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from _random_model import SHAPES, chosen, gpu_options, random_rows, write_random_model
from _result import about, publish

from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.hf import TransformersEngine
from qrpo_core.ids import sample_seed


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


def measure(folder: Path, asked: list[SampleRequest], new_tokens: int, sizes: list[int]) -> dict[str, Any]:
    """Tokens/s and equal rows, at each batch size; the first size is the one that is compared with."""
    params = SamplingParams(1.0, 1.0, new_tokens, ())
    found: dict[str, Any] = {}
    first: list[Completion] = []
    for size in sizes:
        engine = TransformersEngine(folder, batch_size=size)
        engine.sample(asked[:size], SamplingParams(1.0, 1.0, 4, ()))
        began = time.perf_counter()
        drawn = engine.sample(asked, params)
        seconds = time.perf_counter() - began
        first = first or drawn
        found[f"batch size {size}"] = {
            "tokens_per_second": round(sum(len(row.token_ids) for row in drawn) / seconds, 1),
            "equal_a_second_time": equal_share(engine.sample(asked, params), drawn),
            "equal_in_other_company": equal_share(engine.sample(asked[::3], params), drawn[::3]),
            "equal_to_the_first_batch_size": equal_share(drawn, first),
            "exact": engine.exact,
            "engine": engine.name,
        }
        engine.close()
    return found


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    arguments = parser.parse_args()
    name, gpu = chosen(arguments.model)
    head = about(
        "sampling with the transformers engine",
        gpu=gpu,
        model=name,
        versions={"transformers": transformers.__version__},
    )
    asked = requests(name, arguments.prompts, arguments.samples)
    with tempfile.TemporaryDirectory(prefix="qrpo-gpu-sampling-") as scratch:
        folder = write_random_model(name, Path(scratch) / "model")
        found = measure(folder, asked, arguments.new_tokens, arguments.batch_sizes)
    result = {
        **head,
        "rows": len(asked),
        "new_tokens": arguments.new_tokens,
        **found,
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
