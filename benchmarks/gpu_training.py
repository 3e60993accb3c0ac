"""Training on a GPU: tokens/s, peak memory, a loss that falls, and a training that was cut and goes on.

    python benchmarks/gpu_training.py [--model 1b] [--output benchmarks/results/gpu_training.json]
    python benchmarks/gpu_training.py --model tiny          # anywhere: shows that it runs

A Llama of random weights (_random_model.py) is trained by `train_policy`, all weights and then LoRA, on the
same few examples in every epoch, so that the loss must fall. Their reference log-probs are the engine's, as
in the pipeline. Tokens/s are the median over the steps after the first, padding not counted; peak memory is
that of CUDA's allocator (on a CPU, of the process). With --resume a training is cut after its third step and
begun again, and compared with one that was left alone: on a CPU all numbers are equal, on CUDA some sums of
gradients have no fixed order, so the largest differences are given.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from _random_model import SHAPES, chosen, gpu_options, random_rows, write_random_model
from _result import about, publish

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.base import ScoreRequest
from qrpo_core.engines.hf import TransformersEngine
from qrpo_core.objective import get_transform
from qrpo_core.train.run import train_policy

BETA = 0.1
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"learning_rate": 1e-5},
    "all weights, activations computed again": {"learning_rate": 1e-5, "gradient_checkpointing": True},
    "LoRA of rank 16": {"learning_rate": 1e-4, "lora_rank": 16},
}


class CutError(Exception):
    """Ends a training, as a kill would."""


def examples(model: Path, name: str, count: int) -> list[Example]:
    """Completions of quantiles 0 and 1 in turn, with the reference log-probs of the engine."""
    rows = random_rows(count, SHAPES[name]["vocab_size"])
    engine = TransformersEngine(model, precision="bf16")
    known = engine.logprobs([ScoreRequest(prompt, completion) for prompt, completion in rows])
    engine.close()
    shift = BETA * float(get_transform("identity").log_partition(BETA))
    return [
        Example(prompt, completion, float(place % 2) - shift, BETA, float(logprob))
        for place, ((prompt, completion), logprob) in enumerate(zip(rows, known, strict=True))
    ]


def train(
    items: list[Example], model: Path, folder: Path, settings: dict[str, Any], cut: int | None = None
) -> list[dict[str, float]]:
    """The log of a training into folder/policy; begun again after it was cut behind step `cut`."""

    def stop(step: int, steps: int, logged: dict[str, float]) -> None:
        if step == cut:
            raise CutError

    def once(on_step: Any) -> list[dict[str, float]]:
        return train_policy(
            items,
            model,
            folder / "policy",
            objective=ObjectiveConfig(beta=BETA),
            training=TrainingConfig.model_validate(settings),
            work=folder / "work",
            on_step=on_step,
        ).history

    if cut is not None:
        try:
            once(stop)
        except CutError:
            pass
        else:
            raise SystemExit(f"the training ended before step {cut}")
    return once(None)


def measured(log: list[dict[str, float]], epochs: int) -> dict[str, Any]:
    """What is told of a training."""
    later, steps = log[1:], len(log) // epochs
    losses = [step["loss"] for step in log]
    return {
        "steps": len(log),
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in later), 1),
        "padding_share": round(statistics.mean(step["padding_share"] for step in later), 3),
        "peak_memory_gb": round(log[-1]["peak_memory_gb"], 2),
        # Where it begins: 0 but for the order of sums, since the policy is the reference.
        "first_log_ratio_per_token": log[0]["log_ratio_per_token"],
        "mean_loss_by_epoch": [statistics.mean(losses[at : at + steps]) for at in range(0, len(log), steps)],
    }


def resumed(items: list[Example], model: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One training left alone, another one cut and begun again: how far apart they end."""
    settings = settings | {"checkpoint_minutes": 0}
    logs = [train(items, model, folder / name, settings, cut) for name, cut in (("alone", None), ("cut", 3))]
    weights = [
        transformers.AutoModelForCausalLM.from_pretrained(folder / name / "policy", dtype=torch.float32)
        for name in ("alone", "cut")
    ]
    apart = [
        float((one - other).abs().max())
        for one, other in zip(*(model.state_dict().values() for model in weights), strict=True)
    ]
    losses = [abs(one["loss"] - other["loss"]) for one, other in zip(*logs, strict=True)]
    return {"largest_difference_of_weights": max(apart), "largest_difference_of_losses": max(losses)}


def main() -> None:
    parser = gpu_options(__doc__)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--resume", action="store_true", help="LoRA, cut and begun again, with dropout")
    arguments = parser.parse_args()
    name, gpu = chosen(arguments.model)
    head = about(
        "training on a GPU", gpu=gpu, model=name, versions={"transformers": transformers.__version__}
    )
    common = {
        "batch_size": arguments.batch_size,
        "epochs": arguments.epochs,
        "micro_batch_tokens": arguments.micro_batch_tokens,
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qrpo-gpu-training-") as scratch:
        folder = Path(scratch)
        model = write_random_model(name, folder / "model")
        items = examples(model, name, arguments.examples)
        for number, (way, settings) in enumerate(WAYS.items()):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            found[way] = measured(
                train(items, model, folder / str(number), common | settings), arguments.epochs
            )
        if arguments.resume:
            settings = common | WAYS["LoRA of rank 16"] | {"lora_dropout": 0.1}
            found["cut and begun again"] = resumed(items, model, folder, settings)
    result = {
        **head,
        "tokens_an_epoch": sum(len(item.prompt_token_ids) + len(item.token_ids) for item in items),
        **found,
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
