"""Our side of a comparison of training steps (_sides.py starts it): `train_policy` on the job's pairs.

    python benchmarks/_qrpo_side.py JOB.json SETTINGS

A setting is of a kind: `reference` scores the job's completions and keeps the log-probs beside JOB.json,
`train` trains on them, `rate` measures matrix products. Imports of one kind alone stand inside it, so that
peak memory is that of one thing.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _steps import Meter, bf16_tflops, metered, peak_gb, serve

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example, Pair, rows_of
from qrpo_core.data.step_plan import ItemSizes, epoch_order
from qrpo_core.models.memory import ModelShape
from qrpo_core.models.precision import native_bfloat16, pick_device
from qrpo_core.objective import get_transform
from qrpo_core.training.memory import training_memory
from qrpo_core.training.run import train_policy
from qrpo_core.training.trainer import QRPOTrainer

Tell = Callable[[dict[str, Any]], None]
ROWS = ("chosen_ids", "rejected_ids")


def run(job: dict[str, Any], setting: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The result of a setting, by its kind."""
    kept = Path(sys.argv[1]).with_name("reference.json")
    if setting["kind"] == "rate":
        return {"bf16_tflops": bf16_tflops()}
    if setting["kind"] == "reference":
        found, logprobs = reference(job)
        kept.write_text(json.dumps(logprobs))
        return found
    return train(job, setting, json.loads(kept.read_text()), tell)


def reference(job: dict[str, Any]) -> tuple[dict[str, Any], list[list[float]]]:
    """What it took to score the completions as training scores them; log pi_ref, nats [pairs][2]."""
    from qrpo_core.engines.base import LogprobRequest
    from qrpo_core.engines.transformers import TransformersEngine

    requests = [
        LogprobRequest(tuple(pair["prompt_ids"]), tuple(pair[key])) for pair in job["pairs"] for key in ROWS
    ]
    engine = TransformersEngine(job["model"], precision=job["precision"])
    began = time.perf_counter()
    values = engine.logprobs(requests)
    seconds = time.perf_counter() - began
    engine.close()
    found = {"reference_seconds": round(seconds, 3), "peak_memory_gb": round(peak_gb(), 3)}
    return found, values.reshape(-1, 2).tolist()


def train(
    job: dict[str, Any], setting: dict[str, Any], logprobs: list[list[float]], tell: Tell
) -> dict[str, Any]:
    """`train_policy` over the job's pairs, or their completions, in their order, until the last step.

    setting : objective, and training, settings of that section.
    """
    items = training_items(job, setting["objective"], logprobs)
    # The trainer's own order, undone: its step s is to hold the job's s-th batch.
    ordered: list[Any] = [None] * len(items)
    sizes = ItemSizes.of([[(row.prompt_token_ids, row.token_ids) for row in rows_of(item)] for item in items])
    for item, place in zip(items, epoch_order(sizes, 0, 0), strict=True):
        ordered[place] = item
    settings = {
        "learning_rate": job["learning_rate"],
        "epochs": 1,
        "schedule": "constant_with_warmup",
        "warmup_ratio": 0.0,
        "max_grad_norm": job["max_grad_norm"],
        "precision": job["precision"],
        "weights_dtype": "float32",  # as the other side's
        "batch_size": job["pairs_a_step"] * len(items) // len(job["pairs"]),
        "checkpoint_minutes": 60.0,
    }
    training = TrainingConfig.model_validate(settings | setting["training"])
    meter = Meter(tell)
    with tempfile.TemporaryDirectory() as folder, metered(QRPOTrainer, meter):
        train_policy(
            ordered,
            Path(job["model"]),
            Path(folder) / "policy",
            objective=ObjectiveConfig(kind=setting["objective"], beta=job["beta"]),
            training=training,
            work=Path(folder) / "work",
        )
    found = meter.result() | {"formula_memory_gb": round(formula_gb(job, training, meter), 3)}
    gc.collect()
    return found


def formula_gb(job: dict[str, Any], training: TrainingConfig, meter: Meter) -> float:
    """The peak that `qrpo plan` would give for the largest pass, decimal GB."""
    shape = ModelShape.of_config(json.loads((Path(job["model"]) / "config.json").read_text()))
    assert shape is not None
    step, tokens = meter.largest_pass()
    size, passes = job["pairs_a_step"], meter.result()["passes"]
    pairs = job["pairs"][step * size : (step + 1) * size]
    labels = sum(len(pair[key]) for pair in pairs for key in ROWS) / passes[step]
    gpu = torch.cuda.is_available()
    memory = training_memory(
        shape,
        training,
        tokens,
        label_tokens=round(labels),
        several_passes=max(passes) > 1,
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpu else None,
        bfloat16=native_bfloat16(pick_device()),
    )
    return memory.total / 1e9


def training_items(job: dict[str, Any], objective: str, logprobs: list[list[float]]) -> list[Any]:
    """Pairs for dpo. For qrpo their completions, of quantile 1 (chosen) and 0 (rejected)."""
    beta, transform = job["beta"], get_transform("identity")
    shift = beta * float(transform.log_partition(beta))
    items: list[Any] = []
    for pair, known in zip(job["pairs"], logprobs, strict=True):
        chosen, rejected = (
            Example(pair["prompt_ids"], pair[key], quantile - shift, beta, logprob)
            for key, quantile, logprob in zip(ROWS, (1, 0), known, strict=True)
        )
        items += [Pair(chosen, rejected)] if objective == "dpo" else [chosen, rejected]
    return items


if __name__ == "__main__":
    serve(run)
