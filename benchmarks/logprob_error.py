"""How far log-probs in bfloat16 are from float32, and which part of the computation that comes from.

    python benchmarks/logprob_error.py [--model 1b] [--rows 64] [--output errors.json]
    python benchmarks/logprob_error.py --model tiny          # anywhere: shows that it runs

A Llama of random weights and rows of random tokens (_random_model.py). The truth is float32 weights and
arithmetic, a row at a time. Beside the engine's log-probs stand plain forwards, a row at a time and padded
together, these with each attention kernel; then the engine with one thing changed: one row at a time, a loop
of attention over the packed sequences, logits that are rounded to bfloat16, and float32 weights under
autocast. Both sides also with products whose parts cuBLAS may add in bfloat16, as torch allows by default.
Errors are nats a row: the mean of their sizes, their mean (0 if there is no bias) and the largest.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _random_model import SHAPES, chosen, gpu_options, random_rows, write_random_model
from _result import about, publish
from torch.nn.attention import SDPBackend, sdpa_kernel

from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models import packed_attention
from qrpo_core.models.loading import load_model
from qrpo_core.models.precision import careful_kernels, pick_device
from qrpo_core.objective import head_kernels

TOGETHER = 16  # rows of a padded batch of the plain forward


def plain(model: Any, rows: list[LogprobRequest], together: int) -> list[float]:
    """The sums of a plain forward: so many rows padded on the right, all logits, float32 log-softmax."""
    device = next(model.parameters()).device
    sums = []
    for start in range(0, len(rows), together):
        batch = [
            torch.tensor([*row.prompt_token_ids, *row.token_ids]) for row in rows[start : start + together]
        ]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
        lengths = torch.tensor([len(line) for line in batch], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for place, row in enumerate(rows[start : start + together]):
            first, end = len(row.prompt_token_ids), len(batch[place])
            scores = logits[place, first - 1 : end - 1].float().log_softmax(-1)
            sums.append(float(scores.gather(1, ids[place, first:end, None]).double().sum()))
    return sums


@contextlib.contextmanager
def reduced_sums() -> Iterator[None]:
    """cuBLAS may add the parts of a bfloat16 product in bfloat16, as it may by default."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = True
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def ways(folder: Path, rows: list[LogprobRequest], gpu: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, the sums of all rows) of each way."""
    model = load_model(folder, "bfloat16").to(pick_device())
    engine = TransformersEngine(folder, "bfloat16")
    alone, padded = "plain, a row at a time", f"plain, {TOGETHER} rows padded"
    calls: dict[str, Callable[[], Any]] = {
        alone: lambda: plain(model, rows, 1),
        padded: lambda: plain(model, rows, TOGETHER),
        "engine": lambda: engine.logprobs(rows),
    }
    yield from calls.items()
    yield "engine, a row at a time", lambda: [engine.logprobs([row])[0] for row in rows]

    def under(name: str, context: contextlib.AbstractContextManager[Any]) -> Callable[[], Any]:
        def call() -> Any:
            with context:
                return calls[name]()

        return call

    if gpu:
        for kernel in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            yield f"{padded}, {kernel}", under(padded, sdpa_kernel([getattr(SDPBackend, kernel)]))
        for name in calls:
            yield f"{name}, sums in bfloat16 allowed", under(name, reduced_sums())
        yield "engine, attention in a loop", under("engine", replaced(packed_attention, "_flash", False))
        rounded = replaced(head_kernels, "wide_results", lambda *_: False)
        yield "engine, logits rounded", under("engine", rounded)
    mixed = TransformersEngine(folder, precision="bf16")
    yield "engine, float32 weights under autocast", lambda: mixed.logprobs(rows)


def measure(folder: Path, rows: list[LogprobRequest], gpu: bool) -> dict[str, Any]:
    careful_kernels()
    exact = np.asarray(plain(load_model(folder, "float32").to(pick_device()), rows, 1))
    found: dict[str, Any] = {}
    for name, way in ways(folder, rows, gpu):
        try:
            errors = np.asarray(way()) - exact
        except RuntimeError as error:  # a kernel that this device or this mask does not have
            found[name] = str(error).splitlines()[0]
            continue
        found[name] = {
            "mean_size": round(float(np.abs(errors).mean()), 5),
            "mean": round(float(errors.mean()), 5),
            "largest": round(float(np.abs(errors).max()), 5),
        }
    return found


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    name, gpu = chosen(arguments.model)
    versions = {"transformers": transformers.__version__}
    head = about("errors of log-probs in bfloat16", model=name, versions=versions)
    rows = [
        LogprobRequest(prompt, completion)
        for prompt, completion in random_rows(arguments.rows, SHAPES[name]["vocab_size"])
    ]
    with tempfile.TemporaryDirectory(prefix="qrpo-logprob-error-") as scratch:
        folder = write_random_model(name, Path(scratch) / "model")
        found = measure(folder, rows, gpu is not None)
    tokens = sum(len(row.token_ids) for row in rows)
    publish({**head, "rows": len(rows), "completion_tokens": tokens, "errors_nats": found}, arguments.output)


if __name__ == "__main__":
    main()
