"""Training steps on a GPU beside TRL's DPOTrainer: tokens/s, peak memory, passes, share of the chip's rate.

    python benchmarks/gpu_training.py --model 1b [--output benchmarks/results/gpu/training_1b.json]
    python benchmarks/gpu_training.py --model tiny          # anywhere: shows that it runs

A Llama of random weights (_random_model.py) is trained on the same pairs of random tokens in the same order:
16 pairs a step, rows of 64 to 1000 tokens (490 in the mean), 16,384 tokens a pass, float32 weights under
bfloat16 autocast, fused AdamW. TRL has its reference log-probs computed before. Both run one step after the
other; the first ones, which compile, are not counted, and a ratio is the median over the others.

Tokens are those of prompt and completion of both rows of a pair, also where a prompt is computed once for
both. Peak memory is that of CUDA's allocator since training began (without a GPU, of the process so far).
FLOPs of a step, with the tokens T that go through the decoder (a prompt computed once counts once):

    6 x weights of the decoder layers x T  +  6 x layers x width x sum over rows of length^2   (causal)
    +  6 x vocabulary x width x completion tokens       (the head; `counting_every_token`: x T)

They are divided by the seconds and by the rate of bfloat16 products [8192, 8192] measured in the same run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _random_model import SHAPES, chosen, gpu_options, random_pairs, write_random_model
from _result import about, publish, versions
from _sides import ROWS, Side, SideError, difference, ratio, step_tokens, with_rates

#: Ours, in the order of their weight; each a part of the section training.
OURS: dict[str, dict[str, Any]] = {
    "ours_dpo": {"objective": "dpo", "training": {}},
    "ours_qrpo": {"objective": "qrpo", "training": {}},
    "ours_dpo_bfloat16_weights": {"objective": "dpo", "training": {"weights_dtype": "bfloat16"}},
    "ours_dpo_checkpointing": {"objective": "dpo", "training": {"activation_checkpointing": 1.0}},
    "ours_dpo_uncompiled": {"objective": "dpo", "training": {"compile": "never"}},
}


def job_of(name: str, asked: Any, model: Path) -> dict[str, Any]:
    """The job of both sides; see _steps.py."""
    shortest, longest = asked.rows
    count = asked.pairs * (asked.warm_up + asked.steps)
    return {
        "model": str(model),
        "precision": "bf16",
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "beta": 0.1,
        "pairs_a_step": asked.pairs,
        "warm_up_steps": asked.warm_up,
        "pairs": random_pairs(count, SHAPES[name]["vocab_size"], shortest, longest),
    }


def run_side(side: Side, job: dict[str, Any], settings: dict[str, Any], keep: Any) -> None:
    """Let a side go through its settings; keep(name, result or reason) gets each as it comes."""
    steps = len(step_tokens(job))
    for name, setting in settings.items():
        try:
            side.begin()
            if setting.get("kind", "train") == "train":
                for _ in range(steps):
                    side.step()
            keep(name, side.result())
        except SideError as error:
            keep(name, str(error))


def flops(name: str, job: dict[str, Any], run: dict[str, Any], *, every_token: bool) -> float:
    """FLOPs of the mean step after the warm-up; the formula is at the top of this file."""
    shape, pairs = SHAPES[name], job["pairs"][job["warm_up_steps"] * job["pairs_a_step"] :]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"])
    lengths = [len(pair["prompt_ids"]) + len(pair[key]) for pair in pairs for key in ROWS]
    steps = len(pairs) / job["pairs_a_step"]
    positions = run["positions"][job["warm_up_steps"] :]
    tokens = min(sum(lengths), sum(positions)) / steps
    completions = sum(len(pair[key]) for pair in pairs for key in ROWS) / steps
    squares = sum(length**2 for length in lengths) / steps
    head = shape["vocab_size"] * width * (tokens if every_token else completions)
    return 6 * (weights * tokens + layers * width * squares + head)


def add_shares(name: str, job: dict[str, Any], run: dict[str, Any], tflops: float) -> None:
    """Add the shares of the chip's rate, from the median step."""
    seconds = float(np.median(run["seconds"][job["warm_up_steps"] :]))
    for key, every in (("share_of_bf16_rate", False), ("share_counting_every_token", True)):
        run[key] = round(flops(name, job, run, every_token=every) / seconds / tflops / 1e12, 4)


def compared(found: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Ratios of all of ours to TRL's, and the largest differences of losses and gradient norms from it."""
    base = found.get("trl_dpo")
    if base is None:
        return {}
    ours = {name: run for name, run in found.items() if name in OURS}
    same = {n: difference(run, base, job["precision"]) for n, run in ours.items() if "dpo" in n}
    return {
        "ratios_ours_over_trl": {n: ratio(run, base, job["warm_up_steps"]) for n, run in ours.items()},
        "largest_difference_from_trl": same,
    }


def measure(name: str, asked: Any, head: dict[str, Any], folder: Path) -> None:
    """Run both sides; the result is written whenever a setting is done."""
    model = write_random_model(name, folder / "model")
    job = job_of(name, asked, model)
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    lengths = [len(pair["prompt_ids"]) + len(pair[key]) for pair in job["pairs"] for key in ROWS]
    told = {key: value for key, value in job.items() if key not in ("model", "pairs")}
    told |= {"max_tokens": asked.max_tokens, "row_tokens_mean": round(float(np.mean(lengths)), 1)}
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def keep(setting: str, result: dict[str, Any] | str) -> None:
        if isinstance(result, str):
            failed[setting] = result
        else:
            found[setting] = with_rates(result, job) if "losses" in result else result
        for run in found.values():
            if "losses" in run and "ours_rate" in found:
                add_shares(name, job, run, found["ours_rate"]["bf16_tflops"])
        shown = f"{setting}: {json.dumps(failed.get(setting) or found[setting])[:300]}"
        publish(
            head | {"job": told, "runs": found, "failed": failed} | compared(found, job),
            asked.output,
            shown=shown,
        )

    passes = next(
        n
        for n in range(1, asked.pairs + 1)
        if asked.pairs % n == 0
        and 2 * asked.pairs // n * asked.rows[1] <= max(asked.max_tokens, 2 * asked.rows[1])
    )
    trl = {"trl_dpo": {"precompute": True, "passes": passes}}
    ours = {"ours_rate": {"kind": "rate"}, "ours_reference": {"kind": "reference"}}
    for setting in asked.settings or OURS:
        training = OURS[setting]["training"] | {"micro_batch_tokens": asked.max_tokens}
        ours[setting] = OURS[setting] | {"kind": "train", "training": training}
    for python, script, settings in (
        (asked.trl_python, "_trl_side.py", trl),
        (sys.executable, "_qrpo_side.py", ours),
    ):
        side = Side(str(python), script, path, settings)
        try:
            run_side(side, job, settings, keep)
        finally:
            side.close()


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of an optimiser step")
    parser.add_argument("--rows", type=int, nargs=2, default=[64, 1000], help="fewest and most tokens")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a pass")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured")
    parser.add_argument("--settings", nargs="+", choices=OURS, help="of ours; default: all")
    asked = parser.parse_args()
    name, _ = chosen(asked.model)
    head = about(
        "training steps on a GPU beside TRL's DPOTrainer, same pairs and tokens",
        goals={"tokens_per_second": 1.5, "peak_memory": 0.5, "share_of_bf16_rate": 0.35, "passes": 1},
        model=name,
        versions=versions("transformers", "accelerate", "trl", "peft"),
    )
    with tempfile.TemporaryDirectory(prefix="qrpo-gpu-training-") as scratch:
        measure(name, asked, head, Path(scratch))


if __name__ == "__main__":
    main()
