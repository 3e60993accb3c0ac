"""The output head alone, forward and backward: seconds and memory beside plain logits.

    python benchmarks/head.py [--model 1b] [--output benchmarks/results/gpu/head.json]
    python benchmarks/head.py --model tiny          # anywhere: shows that it runs

`label_logprobs`, on a GPU also with compiled kernels, beside linear, log-softmax and gather, on random states
and labels, float32 weights under bfloat16 autocast (float32 on a CPU without it). Given are the median
seconds of forward and backward, the peak memory of CUDA's allocator above what states, weight and its
gradient take, the share of the chip's bfloat16 rate (6 x tokens x width x vocabulary FLOPs, which leaves out
that logits are computed twice), and the largest differences of values (nats) and of the weight's gradient
(relative to its largest entry).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _random_model import SHAPES, chosen, gpu_options
from _result import about, publish
from _steps import bf16_tflops, synchronize

from qrpo_core.models.precision import mixed_precision, pick_device
from qrpo_core.objective.head_kernels import compile_head
from qrpo_core.objective.logprobs import label_logprobs

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way, with all logits in memory."""
    logits = torch.nn.functional.linear(states, weight)
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def timed(head: Head, shape: dict[str, int], tokens: int, rounds: int) -> tuple[dict[str, Any], Any]:
    """What a forward and backward takes, and its values and gradient of the weight."""
    device = pick_device()
    torch.manual_seed(0)
    states = torch.randn(tokens, shape["hidden_size"], device=device, requires_grad=True)
    weight = (0.02 * torch.randn(shape["vocab_size"], shape["hidden_size"], device=device)).requires_grad_()
    labels = torch.randint(shape["vocab_size"], (tokens,), device=device)
    seconds, peak = [], 0.0
    for _ in range(rounds + 1):
        states.grad = weight.grad = None
        synchronize()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated() if device.type == "cuda" else 0, time.perf_counter()
        with mixed_precision("bf16", device):
            values = head(states, weight, labels)
        values.sum().backward()
        synchronize()
        seconds.append(time.perf_counter() - began)
        if device.type == "cuda":
            grads = 4 * (states.numel() + weight.numel())
            peak = (torch.cuda.max_memory_allocated() - before - grads) / 1e9
    found = {
        "seconds": round(statistics.median(seconds[1:]), 5),
        "warm_up_seconds": round(seconds[0], 3),
        "peak_memory_gb": round(peak, 3),
    }
    return found, (values.detach(), weight.grad)


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="completion tokens")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    name, gpu = chosen(asked.model)
    shape = SHAPES[name]
    result = about("the output head alone beside plain logits", model=name) | {"tokens": asked.tokens}
    result["bf16_tflops"] = bf16_tflops()
    ours, (values, grad) = timed(label_logprobs, shape, asked.tokens, asked.rounds)
    theirs, (plain_values, plain_grad) = timed(plain, shape, asked.tokens, asked.rounds)
    runs = {"ours": ours, "plain": theirs}
    if gpu:
        compile_head()
        runs["compiled"] = timed(label_logprobs, shape, asked.tokens, asked.rounds)[0]
    flops = 6 * asked.tokens * shape["hidden_size"] * shape["vocab_size"]
    for run in runs.values():
        run["share_of_bf16_rate"] = round(flops / run["seconds"] / result["bf16_tflops"] / 1e12, 4)
    result |= runs | {
        "largest_difference_nats": float((values - plain_values).abs().max()),
        "largest_difference_of_gradient": float((grad - plain_grad).abs().max() / plain_grad.abs().max()),
    }
    publish(result, asked.output)


if __name__ == "__main__":
    main()
