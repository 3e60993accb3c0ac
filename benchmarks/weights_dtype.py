"""What a training reaches in each arithmetic: float32 weights, bfloat16 weights, and all of it in float32.

    python benchmarks/weights_dtype.py [--steps 16] [--output benchmarks/results/weights_dtype.json]

SmolLM2-135M-Instruct (its weights are on the bfloat16 grid) is trained on the same batch in every step: eight
pieces of this project's documents, half of them to become more probable by 3 nats, the others less. A
training that sees its own movement stops there; one that does not goes on and overshoots. The reference
log-probs are in the arithmetic of the training, and what was reached is scored in float32. Given are, by
learning rate and arithmetic

reached   mean of log-ratio times the sign of its target, nats: 3 is all of it
miss      root mean square of log-ratio minus target, nats
loss      of the first and the last step, as the training saw it
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _result import about, options, publish
from _smollm2 import smollm2
from saved_precision import BATCH, BETA, CPU, rows_of

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model
from qrpo_core.training.run import train_policy
from qrpo_core.training.survival import float32_logprobs

RATES = (1e-6, 5e-6)
TARGET = 3.0
ARITHMETICS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, float32 weights": {"precision": "bf16", "weights_dtype": "float32"},
    "bf16, bfloat16 weights": {"precision": "bf16", "weights_dtype": "bfloat16"},
}


def reached(rate: float, arithmetic: str, folder: Path, rows: list[Example], steps: int) -> dict[str, Any]:
    """Train on `rows`, one batch, and score in float32 what the policy became."""
    training = TrainingConfig(
        learning_rate=rate,
        batch_size=BATCH,
        epochs=steps,
        warmup_ratio=0,
        schedule="constant_with_warmup",
        **ARITHMETICS[arithmetic],
    )
    asked = [LogprobRequest(tuple(row.prompt_token_ids), tuple(row.token_ids)) for row in rows]
    scores = TransformersEngine(folder, precision=training.arithmetic).logprobs(asked).tolist()
    rows = [replace(row, ref_logprob=score) for row, score in zip(rows, scores, strict=True)]
    with tempfile.TemporaryDirectory() as scratch:
        policy = Path(scratch) / "policy"
        done = train_policy(
            rows,
            folder,
            policy,
            objective=ObjectiveConfig(beta=BETA),
            training=training,
            work=Path(scratch) / "work",
        )
        base, moved = (
            np.array(float32_logprobs(load_model(place, "float32"), rows, CPU)) for place in (folder, policy)
        )
    targets = np.array([row.target for row in rows], dtype=float) / BETA
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    found = {
        "learning_rate": rate,
        "arithmetic": arithmetic,
        "reached_nats": round(float(np.mean((moved - base) * np.sign(targets))), 3),
        "miss_nats": round(float(np.sqrt(np.mean((moved - base - targets) ** 2))), 3),
        "loss": [round(losses[0], 5), round(losses[-1], 5)],
    }
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args()
    head = about("weights_dtype", goals={"reached_nats": TARGET, "miss_nats": "that of fp32"})
    folder = smollm2()
    rows = [
        replace(row, target=TARGET * BETA * (-1) ** number)
        for number, row in enumerate(rows_of(folder, BATCH))
    ]
    found = [reached(rate, each, folder, rows, given.steps) for rate in RATES for each in ARITHMETICS]
    publish(head | {"model": "SmolLM2-135M-Instruct", "steps": given.steps, "trained": found}, given.output)


if __name__ == "__main__":
    main()
