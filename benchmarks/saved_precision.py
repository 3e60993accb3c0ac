"""What is left of a training in bfloat16: rounded to the nearest, and at random as this project does.

    python benchmarks/saved_precision.py [--steps 8] [--output benchmarks/results/saved_precision.json]

SmolLM2-135M-Instruct (the demo's model, its weights on the bfloat16 grid) is trained by `train_policy` on
pieces of this project's documents, every second one to become more probable, the others less, at three
learning rates. Each trained policy is then written in bfloat16 in both ways, and rows that it was trained on,
and rows that it never saw, are scored in float32 arithmetic. Given are

share       slope of the written policy's log-ratios to the start on the trained one's: 1 where all survived
unchanged   share of the weights that are those of the start
noise       largest difference of a row's log-prob from the trained policy's, nats
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _result import about, options, publish
from _smollm2 import smollm2

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.models.chat import Chat
from qrpo_core.models.loading import load_model
from qrpo_core.models.rounding import stochastic_bfloat16
from qrpo_core.training.run import train_policy
from qrpo_core.training.survival import float32_logprobs, survival

ROOT = Path(__file__).parents[1]
RATES = (1e-6, 1e-5, 1e-4)
BATCH, LENGTH, BETA, SCORED = 8, 24, 0.1, 24
CPU = torch.device("cpu")


def rows_of(folder: Path, count: int) -> list[Example]:
    """Prompts and completions of LENGTH tokens each, cut out of the documents; the same ones every time."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    tokens = Chat.load(folder).encode_completion(text)
    starts = np.random.default_rng(0).permutation(len(tokens) // (2 * LENGTH))[:count] * 2 * LENGTH
    rows = [
        Example(tokens[start : start + LENGTH], tokens[start + LENGTH : start + 2 * LENGTH])
        for start in starts.tolist()
    ]
    scores = float32_logprobs(load_model(folder, "float32"), rows, CPU)
    # Log-ratios of 5 nats, up and down in turns.
    return [
        replace(row, target=5 * BETA * (-1) ** number, beta=BETA, ref_logprob=score)
        for number, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]


def rounded(policy: Path, way: str) -> Any:
    """The policy in bfloat16, as a float32 model."""
    if way == "nearest":
        return load_model(policy, "bfloat16").float()
    model = load_model(policy, "float32")
    for name, weight in model.named_parameters():
        weight.data = stochastic_bfloat16(weight, name).float()
    return model


def unchanged(model: Any, start: Any) -> float:
    """Share of the weights that two models have in common."""
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    same = [(int((one == other).sum()), one.numel()) for one, other in pairs]
    return sum(count for count, _ in same) / sum(size for _, size in same)


def at_rate(rate: float, folder: Path, rows: list[Example], unseen: list[Example]) -> dict[str, Any]:
    """Train at a learning rate, write in both ways, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        policy = Path(scratch) / "policy"
        done = train_policy(
            rows,
            folder,
            policy,
            objective=ObjectiveConfig(beta=BETA),
            training=TrainingConfig(learning_rate=rate, batch_size=BATCH, warmup_ratio=0, precision="fp32"),
            work=Path(scratch) / "work",
        )
        start, trained = load_model(folder, "float32"), load_model(policy, "float32")
        models = {way: rounded(policy, way) for way in ("nearest", "stochastic")}
    found: dict[str, Any] = {"learning_rate": rate, "steps": len(done.history)}
    found["unchanged"] = {way: round(unchanged(model, start), 4) for way, model in models.items()}
    for name, scored in (("trained_rows", rows[:SCORED]), ("unseen_rows", unseen)):
        base, moved = (float32_logprobs(model, scored, CPU) for model in (start, trained))
        each = {
            way: survival(base, moved, float32_logprobs(model, scored, CPU)) for way, model in models.items()
        }
        found[name] = {
            "mean_log_ratio_nats": round(each["nearest"].trained, 4),
            "share": {way: one.share and round(one.share, 3) for way, one in each.items()},
            "noise_nats": {way: round(one.largest_difference, 4) for way, one in each.items()},
        }
    print(found, file=sys.stderr)
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    head = about("what survives of a training in bfloat16", goals={"share": "0.9 or more on trained rows"})
    folder = smollm2()
    rows = rows_of(folder, BATCH * given.steps + SCORED)
    count = BATCH * given.steps
    rates = [at_rate(rate, folder, rows[:count], rows[count:]) for rate in RATES]
    publish(head | {"model": "SmolLM2-135M-Instruct", "rates": rates}, given.output)


if __name__ == "__main__":
    main()
