"""Our side of training_vs_trl.py: the job, the reference log-probs, and QRPOTrainer on them.

    python benchmarks/_qrpo_side.py NAME SCRATCH SETTINGS

NAME `prepare` writes SCRATCH/job.json, `reference` SCRATCH/reference.json, any other trains and writes
SCRATCH/NAME.json. Each is a process of its own, so that its peak memory is that of one
thing; for the same reason imports of one of them alone stand inside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _trl_side import Meter, peak_gb, shared_arguments, versions
from transformers import TrainingArguments

from qrpo_core.data.batches import epoch_order
from qrpo_core.data.collator import Example, Pair
from qrpo_core.objective import get_transform
from qrpo_core.policy import load_model, load_tokenizer
from qrpo_core.train.config import ObjectiveConfig
from qrpo_core.train.trainer import QRPOTrainer

if TYPE_CHECKING:
    from qrpo_core.data.chat import Chat

ROWS = ("chosen_ids", "rejected_ids")


def prepare(asked: dict[str, Any]) -> dict[str, Any]:
    """The job: the model, the pairs as token ids in the order they are trained on, the settings.

    asked : model (None: SmolLM2), pairs_a_step, small_pass, count (of pairs), shortest and longest (tokens of
        a row).
    """
    from _smollm2 import SMOLLM2, smollm2

    from qrpo_core.data.chat import Chat
    from qrpo_core.engines.numerics import native_bfloat16, pick_device

    directory = Path(asked["model"]) if asked["model"] else smollm2()
    pairs, passed_over = draw_pairs(Chat.load(directory), asked["count"], asked["shortest"], asked["longest"])
    return {
        "model": str(directory),
        "name": directory.name if asked["model"] else SMOLLM2,
        "precision": "bf16" if native_bfloat16(pick_device()) else "fp32",
        "learning_rate": 1e-5,
        "beta": 0.1,
        "pairs_a_step": asked["pairs_a_step"],
        "small_pass": asked["small_pass"],
        "passed_over": passed_over,
        "pairs": pairs,
    }


def draw_pairs(chat: Chat, count: int, shortest: int, longest: int) -> tuple[list[dict[str, Any]], int]:
    """`count` pairs as token ids, and how many were passed over because a row was too short or too long."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=100 * count, seed=0)
    pairs: list[dict[str, Any]] = []
    for index, (task, other) in enumerate(zip(drawn, list(drawn)[1:], strict=False)):
        prompt = chat.prompt_token_ids([{"role": "user", "content": task["question"]}])
        answers = [chat.encode_completion(one["metadata"]["answer_cot"]) for one in (task, other)]
        lengths = [len(prompt) + len(answer) for answer in answers]
        if shortest <= min(lengths) and max(lengths) <= longest:
            chosen, rejected = answers
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        if len(pairs) == count:
            return pairs, index + 1 - count
    raise SystemExit(
        f"{len(pairs)} of {len(drawn)} problems have rows of {shortest} to {longest} tokens, {count} are "
        "needed: widen --shortest and --longest"
    )


def reference(job: dict[str, Any]) -> dict[str, Any]:
    """log pi_ref of chosen and rejected of each pair, nats [pairs][2], and what it took."""
    from qrpo_core.engines.base import ScoreRequest
    from qrpo_core.engines.hf import TransformersEngine

    requests = [
        ScoreRequest(tuple(pair["prompt_ids"]), tuple(pair[key])) for pair in job["pairs"] for key in ROWS
    ]
    engine = TransformersEngine(job["model"], precision=job["precision"])
    began = time.perf_counter()
    values = engine.logprobs(requests)
    seconds = time.perf_counter() - began
    tokens = sum(len(request.prompt_token_ids) + len(request.token_ids) for request in requests)
    return {
        "logprobs": values.reshape(-1, 2).tolist(),
        "reference_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "peak_memory_gb": round(peak_gb(), 3),
        "versions": versions(),
    }


def ours(job: dict[str, Any], settings: dict[str, Any], logprobs: list[list[float]]) -> dict[str, Any]:
    """QRPOTrainer over the job's pairs, or their completions, in their order."""
    items = training_items(job, settings["objective"], logprobs)
    # The trainer's own order, undone: its step s is to hold the job's s-th batch.
    ordered: list[Any] = [None] * len(items)
    for item, place in zip(items, epoch_order(len(items), 0, 0), strict=True):
        ordered[place] = item
    with tempfile.TemporaryDirectory() as folder:
        arguments = shared_arguments(job, folder, checkpointing=settings["checkpointing"])
        trainer = QRPOTrainer(
            load_model(Path(job["model"]), "float32"),
            TrainingArguments(**arguments),
            ordered,
            objective=ObjectiveConfig(kind=settings["objective"], beta=job["beta"]),
            pad_token_id=load_tokenizer(Path(job["model"])).pad_token_id or 0,
            batch_size=job["pairs_a_step"] * len(items) // len(job["pairs"]),
            max_tokens=settings["max_tokens"] or job["small_pass"],
        )
        meter = Meter(trainer)
        trainer.train()
    return meter.result() | {"versions": versions()}


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


def main() -> None:
    name, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if name == "prepare":
        found, out = prepare(settings), folder / "job.json"
    else:
        job, out = json.loads((folder / "job.json").read_text()), folder / f"{name}.json"
        if name == "reference":
            found = reference(job)
        else:
            logprobs = json.loads((folder / "reference.json").read_text())["logprobs"]
            found = ours(job, settings, logprobs)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
