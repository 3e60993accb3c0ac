"""DPO steps of QRPOTrainer beside those of TRL's DPOTrainer: tokens/s and peak memory, as ratios in one run.

    make bench-trl
    python benchmarks/training_vs_trl.py [--pairs 4] [--steps 2] [--output FILE]

Both train SmolLM2-135M-Instruct on the same pairs in the same order: the same token ids, float32 weights
(under bfloat16 autocast where that is native), AdamW, learning rate and batch size, no dropout, one optimiser
step after another, with as many threads as there are physical cores. Every setting in RUNS is a process of
its own, one after the other, the two sides in turn. The first step of each warms up and is not counted.

Tokens are those of prompt and completion of both rows of a pair; padding is not counted. Losses and gradient
norms of both sides must agree, or nothing is written: it would not be the same computation.

The pairs are grade-school problems (reasoning_gym's gsm_symbolic) in the model's chat template: the chosen
completion is the worked solution, the rejected one that of another problem. On CUDA, which nobody has tried
yet, memory is that of CUDA's allocator and the parts of a step are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _result import command_line, commit, hardware, publish

ROWS = ("chosen_ids", "rejected_ids")
HERE = Path(__file__).resolve().parent

#: name: (what it is, settings), in the order in which they run. A name begins with its side.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("log pi_ref of every completion, by the engine; stored for all of ours", {}),
    "trl_reference": (
        "reference model in memory, its forward in every step",
        {"precompute": False, "checkpointing": False, "pairs_a_pass": None},
    ),
    "ours_dpo": (
        "stored reference log-probs, the pipeline's 8192 tokens a pass",
        {"objective": "dpo", "max_tokens": 8192, "checkpointing": False},
    ),
    "trl_precomputed": (
        "precompute_ref_log_probs",
        {"precompute": True, "checkpointing": False, "pairs_a_pass": None},
    ),
    "ours_dpo_small_passes": (
        "stored reference log-probs, fewer tokens a pass (small_pass)",
        {"objective": "dpo", "max_tokens": None, "checkpointing": False},
    ),
    "trl_precomputed_single_pairs": (
        "precompute_ref_log_probs, one pair a pass, accumulated",
        {"precompute": True, "checkpointing": False, "pairs_a_pass": 1},
    ),
    "ours_qrpo": (
        "objective qrpo on the same completions, 8192 tokens a pass",
        {"objective": "qrpo", "max_tokens": 8192, "checkpointing": False},
    ),
    "trl_reference_checkpointing": (
        "trl_reference with activation checkpointing: DPOConfig's defaults but for the dtype",
        {"precompute": False, "checkpointing": True, "pairs_a_pass": None},
    ),
    "ours_dpo_checkpointing": (
        "ours_dpo with activation checkpointing",
        {"objective": "dpo", "max_tokens": 8192, "checkpointing": True},
    ),
    "trl_precomputed_checkpointing": (
        "trl_precomputed with activation checkpointing",
        {"precompute": True, "checkpointing": True, "pairs_a_pass": None},
    ),
}

#: (ours, TRL's, what differs besides the library). Other ratios follow from the runs.
COMPARED = (
    ("ours_dpo", "trl_reference", "TRL has its reference model in memory"),
    ("ours_dpo", "trl_precomputed", "nothing"),
    ("ours_dpo_small_passes", "trl_reference", "ours in small passes; TRL has its reference model in memory"),
    ("ours_dpo_small_passes", "trl_precomputed_single_pairs", "nothing: both in the smallest passes"),
    ("ours_dpo_checkpointing", "trl_reference_checkpointing", "TRL has its reference model in memory"),
    ("ours_dpo_checkpointing", "trl_precomputed_checkpointing", "nothing"),
    ("ours_dpo", "trl_reference_checkpointing", "each library's own defaults"),
    ("ours_qrpo", "trl_reference", "objective qrpo; TRL has its reference model in memory"),
)

#: Options of TRL 1.16 that would be fair and do not run here, with the reason.
NOT_RUN = {
    "padding_free": "accepted with a warning, and ignored, by TRL 1.16's DPOTrainer",
    "use_liger_kernel": "Triton kernels, for accelerators; deprecated there, its fused loss refused",
    "train_sampling_strategy=group_by_length": "other pairs in a step: not the same computation",
}

#: Largest difference of a loss (nats) and of a gradient norm (relative) that rounding explains.
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (5e-2, 1e-1)}


def start(
    name: str, arguments: argparse.Namespace, scratch: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run one process to its end and read what it wrote; its output is shown only if it fails."""
    out = scratch / ("job.json" if name == "prepare" else f"{name}.json")
    if name.startswith("trl"):
        python, script = arguments.trl_python, "_trl_side.py"
        places = [scratch / "job.json", out]
    else:
        python, script = Path(sys.executable), "_qrpo_side.py"
        places = [name, scratch]
    command = [str(word) for word in (python, HERE / script, *places, json.dumps(settings))]
    threads = str(arguments.threads)
    settled = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | settled | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def with_reference(found: dict[str, dict[str, Any]], tokens: int) -> None:
    """Add tokens/s that count the reference log-probs too. tokens : of the whole job, rows of each pair."""
    for name, run in found.items():
        taken = found["reference"] if name.startswith("ours") else run
        if name != "reference" and "reference_seconds" in taken:
            share = taken["reference_seconds"] * run["tokens"] / tokens
            rate = run["tokens"] / (sum(run["seconds"]) + share)
            run["tokens_per_second_with_reference"] = round(rate, 2)


def difference(name: str, run: dict[str, Any], base: dict[str, Any], precision: str) -> dict[str, float]:
    """Largest differences of a dpo run from trl_reference. Ends the script where they are too large."""
    if run["tokens"] != base["tokens"]:
        raise SystemExit(
            f"{name} saw {run['tokens']} tokens, trl_reference {base['tokens']}: not the same job"
        )
    if name == "ours_qrpo":
        return {}
    loss = max(abs(a - b) for a, b in zip(run["losses"], base["losses"], strict=True))
    norms = zip(run["gradient_norms"], base["gradient_norms"], strict=True)
    norm = max(abs(a - b) / b for a, b in norms)
    most_loss, most_norm = TOLERANCE[precision]
    if loss > most_loss or norm > most_norm:
        raise SystemExit(
            f"{name} and trl_reference do not compute the same: losses {run['losses']} and {base['losses']}, "
            f"gradient norms {run['gradient_norms']} and {base['gradient_norms']}"
        )
    return {"loss_nats": float(f"{loss:.2g}"), "gradient_norm_relative": float(f"{norm:.2g}")}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over TRL's: tokens/s, the same with the reference log-probs counted, and peak memory."""
    whole = "tokens_per_second_with_reference"
    return {
        f"{name} / {other}": {
            "what": what,
            "tokens_per_second": round(
                found[name]["tokens_per_second"] / found[other]["tokens_per_second"], 3
            ),
            # A reference model in memory is paid for in every step.
            whole: round(found[name][whole] / found[other].get(whole, found[other]["tokens_per_second"]), 3),
            "peak_memory": round(found[name]["peak_memory_gb"] / found[other]["peak_memory_gb"], 3),
        }
        for name, other, what in COMPARED
        if name in found and other in found
    }


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All runs, one after the other, and the file made of them."""
    machine, began = hardware(), time.perf_counter()
    asked = {
        "model": arguments.model and str(arguments.model),
        "count": arguments.pairs * (arguments.steps + 1),
        "pairs_a_step": arguments.pairs,
        "small_pass": arguments.small_pass,
        "shortest": arguments.shortest,
        "longest": arguments.longest,
    }
    job = start("prepare", arguments, scratch, asked)
    found: dict[str, dict[str, Any]] = {}
    same: dict[str, Any] = {}
    for name, (what, settings) in RUNS.items():
        if arguments.only and name not in (*arguments.only, "reference", "trl_reference"):
            continue
        run = found[name] = {"what": what, **start(name, arguments, scratch, settings)}
        print(
            f"{time.perf_counter() - began:5.0f} s  {name:30} {run['tokens_per_second']:8.1f} tokens/s"
            f"  peak {run['peak_memory_gb']:.2f} GB",
            file=sys.stderr,
        )
        if name not in ("reference", "trl_reference"):
            same[name] = difference(name, run, found["trl_reference"], job["precision"])
    del found["reference"]["logprobs"]
    rows = [len(pair["prompt_ids"]) + len(pair[key]) for pair in job["pairs"] for key in ROWS]
    with_reference(found, sum(rows))
    used = {name: run.pop("versions") for name, run in found.items()}
    return {
        "benchmark": "optimiser steps of QRPOTrainer (dpo) beside TRL's DPOTrainer, same pairs and tokens",
        "goal": {"tokens_per_second": 1.3, "peak_memory": 0.6},
        "hardware": machine,
        "versions": {"ours": used["reference"], "trl": used["trl_reference"]},
        "commit": commit(),
        "command": command_line(),
        "seconds": round(time.perf_counter() - began),
        "job": {
            "model": job["name"],
            "pairs": len(rows) // 2,
            "row_tokens": {"shortest": min(rows), "mean": round(sum(rows) / len(rows)), "longest": max(rows)},
            **{key: job[key] for key in job if key not in ("model", "name", "pairs")},
            "warm_up_steps": 1,
            "steps": arguments.steps,
        },
        "ratios_ours_over_trl": ratios(found),
        "largest_difference_from_trl_reference": {name: row for name, row in same.items() if row},
        "tolerance": dict(
            zip(("loss_nats", "gradient_norm_relative"), TOLERANCE[job["precision"]], strict=True)
        ),
        "where_the_time_goes": {name: run.pop("parts") for name, run in found.items() if "parts" in run},
        "runs": found,
        "trl_options_not_run": NOT_RUN,
    }


def main() -> None:
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl-python", type=Path, default=Path(".venv-trl/bin/python"))
    parser.add_argument("--model", type=Path, help="a directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of an optimiser step")
    parser.add_argument("--steps", type=int, default=2, help="steps that are measured, after one")
    parser.add_argument("--shortest", type=int, default=64, help="fewest tokens of a row")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a row")
    parser.add_argument("--small-pass", type=int, default=512, help="tokens of ours_dpo_small_passes")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these, reference and trl_reference")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not arguments.trl_python.exists():
        raise SystemExit(f"no TRL in {arguments.trl_python}: make bench-trl")
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
