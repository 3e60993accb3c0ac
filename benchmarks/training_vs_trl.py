"""Training steps beside TRL's DPOTrainer on the same pairs, in turns: tokens/s and peak memory, as ratios.

    make bench-trl
    python benchmarks/training_vs_trl.py [--pairs 4] [--rounds 5] [--output FILE]

Both train SmolLM2-135M-Instruct on the same pairs in the same order: the same token ids, float32 weights
(under bfloat16 autocast where that is native), AdamW, learning rate and batch size, no dropout, with as many
threads as there are physical cores. Every entry of RUNS is a process of its own. They take turns: a round is
one optimiser step of each, and a ratio is the median over the rounds. One round before them warms up. Ours
runs `train_policy` with the settings of an experiment, TRL's side DPOTrainer with DPOConfig.

Tokens are those of prompt and completion of both rows of a pair; padding is not counted. Peak memory is the
process's own, loading included. Losses and gradient norms of both sides must agree, or nothing is written: it
would not be the same computation.

The pairs are grade-school problems (reasoning_gym's gsm_symbolic) in the model's chat template: the chosen
completion is the worked solution, the rejected one that of another problem. On a GPU: benchmarks/gpu.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from _result import about, options, publish, versions
from _sides import ROWS, TOLERANCE, Side, SideError, difference, ratio, step_tokens, with_rates

if TYPE_CHECKING:
    from qrpo_core.models.chat import Chat

#: name: (what it is, its setting). A name begins with its side; TRL's run first in a round.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl_reference": ("reference model in memory, its forward in every step", {"precompute": False}),
    "ours_dpo": ("the pipeline's defaults", {"objective": "dpo"}),
    "trl_precomputed": ("reference log-probs computed before", {"precompute": True}),
    "ours_qrpo": ("objective qrpo on the same completions", {"objective": "qrpo"}),
    "trl_precomputed_single_pairs": (
        "reference log-probs computed before, one pair a pass",
        {"precompute": True, "passes": None},
    ),
    "ours_dpo_small_passes": (
        "as few tokens a pass as TRL's single pairs",
        {"objective": "dpo", "training": {"micro_batch_tokens": None}},
    ),
}

#: (ours, TRL's, what differs besides the library).
COMPARED = (
    ("ours_dpo", "trl_precomputed", "nothing"),
    ("ours_dpo", "trl_reference", "TRL has its reference model in memory"),
    ("ours_qrpo", "trl_precomputed", "objective qrpo"),
    ("ours_qrpo", "trl_reference", "objective qrpo; TRL has its reference model in memory"),
    ("ours_dpo_small_passes", "trl_precomputed_single_pairs", "nothing: both in small passes"),
    ("ours_dpo_small_passes", "trl_reference", "ours in small passes; TRL has its reference model in memory"),
)

#: Options of TRL 1.16 that would be fair and do not run here, with the reason.
NOT_RUN = {
    "padding_free": "accepted with a warning, and ignored, by TRL 1.16's DPOTrainer",
    "use_liger_kernel": "Triton kernels, for accelerators; deprecated there, its fused loss refused",
    "train_sampling_strategy=group_by_length": "other pairs in a step: not the same computation",
}


def draw_pairs(chat: Chat, count: int, shortest: int, longest: int) -> list[dict[str, Any]]:
    """`count` pairs as token ids, of rows that are neither too short nor too long."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=100 * count, seed=0)
    pairs: list[dict[str, Any]] = []
    for task, other in zip(drawn, list(drawn)[1:], strict=False):
        prompt = chat.prompt_token_ids([{"role": "user", "content": task["question"]}])
        answers = [chat.encode_completion(one["metadata"]["answer_cot"]) for one in (task, other)]
        lengths = [len(prompt) + len(answer) for answer in answers]
        if shortest <= min(lengths) and max(lengths) <= longest:
            chosen, rejected = answers
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        if len(pairs) == count:
            return pairs
    raise SystemExit(
        f"{len(pairs)} of {len(drawn)} problems have rows of {shortest} to {longest} tokens, {count} are "
        "needed: widen --shortest and --longest"
    )


def prepare(asked: argparse.Namespace) -> dict[str, Any]:
    """The job: the model, the pairs as token ids in the order they are trained on, the settings."""
    from _smollm2 import smollm2

    from qrpo_core.models.chat import Chat
    from qrpo_core.models.precision import native_bfloat16, pick_device

    directory = asked.model or smollm2()
    count = asked.pairs * (asked.rounds + 1)
    return {
        "model": str(directory),
        "precision": asked.precision or ("bf16" if native_bfloat16(pick_device()) else "fp32"),
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "beta": 0.1,
        "pairs_a_step": asked.pairs,
        "warm_up_steps": 1,
        "pairs": draw_pairs(Chat.load(directory), count, asked.shortest, asked.longest),
    }


def setting_of(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A setting of RUNS with the numbers of the command line."""
    setting = RUNS[name][1]
    if name.startswith("trl"):
        return setting | {"passes": asked.pairs if "passes" in setting else 1}
    small = {"micro_batch_tokens": 2 * asked.longest}
    return {"kind": "train", "training": small if "training" in setting else {}} | {
        key: value for key, value in setting.items() if key != "training"
    }


def rounds(asked: argparse.Namespace, job: Path) -> dict[str, dict[str, Any]]:
    """Each run's result; all of them take a step in turn."""
    began = time.perf_counter()
    names = asked.only or list(RUNS)
    scored = Side(
        sys.executable, "_qrpo_side.py", job, {"ours_reference": {"kind": "reference"}}, asked.threads
    )
    scored.begin()
    found = {"ours_reference": scored.result()}
    scored.close()
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            python = str(asked.trl_python) if name.startswith("trl") else sys.executable
            script = "_trl_side.py" if name.startswith("trl") else "_qrpo_side.py"
            sides[name] = Side(python, script, job, {name: setting_of(name, asked)}, asked.threads)
            stack.callback(sides[name].close)
            sides[name].begin()
        for number in range(asked.rounds + 1):
            for name, side in sides.items():
                spent = side.step()
                told = f"{time.perf_counter() - began:5.0f} s  round {number}  {name:30} {spent:6.2f} s"
                print(told + ("  (warms up)" if not number else ""), file=sys.stderr)
        return found | {name: side.result() for name, side in sides.items()}


def compare(found: dict[str, dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """Ratios, ours over TRL's, and the largest differences from trl_reference."""
    whole = sum(step_tokens(job))
    ratios = {}
    for ours, theirs, what in COMPARED:
        if ours in found and theirs in found:
            ratios[f"{ours} / {theirs}"] = {"what": what, **ratio(found[ours], found[theirs], 1)}
            rates = []
            for name in (ours, theirs):
                scored = found["ours_reference"] if name == ours else found[name]
                seconds = scored.get("reference_seconds", 0.0) / whole
                rates.append(1 / (1 / found[name]["tokens_per_second"] + seconds))
            # A reference model in memory is paid for in every step.
            ratios[f"{ours} / {theirs}"]["with_reference_logprobs"] = round(rates[0] / rates[1], 3)
    base = found.get("trl_reference")
    same = {
        name: difference(run, base, job["precision"])
        for name, run in found.items()
        if base and "losses" in run and name not in ("ours_qrpo", "trl_reference")
    }
    for name, row in same.items():
        if not row.pop("explained_by_rounding"):
            losses = [[round(loss, 4) for loss in found[one]["losses"]] for one in (name, "trl_reference")]
            raise SystemExit(f"{name} and trl_reference do not compute the same: {row}, losses {losses}")
    return {"ratios_ours_over_trl": ratios, "largest_difference_from_trl_reference": same}


def main() -> None:
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    parser = options(__doc__)
    parser.add_argument("--trl-python", type=Path, default=Path(".venv-trl/bin/python"))
    parser.add_argument("--model", type=Path, help="a directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of an optimiser step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured, after one")
    parser.add_argument("--shortest", type=int, default=64, help="fewest tokens of a row")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a row")
    parser.add_argument("--only", nargs="+", choices=RUNS)
    parser.add_argument("--precision", choices=TOLERANCE, help="bf16 where it is native, by default")
    parser.add_argument("--threads", type=int, default=cores)
    asked = parser.parse_args()
    if not asked.trl_python.exists():
        raise SystemExit(f"no TRL in {asked.trl_python}: make bench-trl")
    head = about(
        "optimiser steps beside TRL's DPOTrainer, same pairs and tokens, in turns",
        goals={"tokens_per_second": 2.0, "peak_memory": 0.6},
        versions=versions("transformers", "accelerate"),
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        job, path = prepare(asked), Path(scratch) / "job.json"
        path.write_text(json.dumps(job))
        try:
            found = rounds(asked, path)
        except SideError as error:
            raise SystemExit(f"a side failed: {error}") from None
    found = {name: with_rates(run, job) if "losses" in run else run for name, run in found.items()}
    lengths = [len(pair["prompt_ids"]) + len(pair[key]) for pair in job["pairs"] for key in ROWS]
    result = {
        **head,
        "seconds": round(time.perf_counter() - began),
        "job": {
            "model": asked.model.name if asked.model else "SmolLM2-135M-Instruct",
            "row_tokens": {
                "shortest": min(lengths),
                "mean": round(sum(lengths) / len(lengths)),
                "longest": max(lengths),
            },
            "rounds": asked.rounds,
            **{key: job[key] for key in job if key not in ("model", "pairs")},
        },
        **compare(found, job),
        "runs": {
            name: {"what": RUNS[name][0], **run} if name in RUNS else run for name, run in found.items()
        },
        "trl_options_not_run": NOT_RUN,
    }
    publish(result, asked.output)


if __name__ == "__main__":
    main()
