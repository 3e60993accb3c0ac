"""Tokens/s of the engine vllm beside bare LLM.generate on the same requests, in the same environment.

    make bench-vllm
    python benchmarks/vllm_sampling.py [--prompts 16] [--samples 8] [--rounds 3] [--output FILE]
    python benchmarks/vllm_sampling.py --random-model 135m --prompts 128 --batch-invariant   # for a GPU

Both have the model loaded in bfloat16 (float32 on a CPU without it), in a process each, and draw in turn:
ours through `VllmEngine.sample`, every row by its own seed (requests handed to a child process, answers
handed back and checked); the other with one `LLM.generate` of the same token ids, limits and log-probs, once
without seeds, which costs vLLM least, and once with the same seeds. Loading and one round to warm up are not
counted. The other side runs as vLLM starts by itself, its core in a further process, with a tokenizer and
texts made; ours on the CPU has the core in the child and makes no texts. A ratio is of each round's
tokens/s; the goal is a median of 0.97 beside the other side without seeds.

Then the same rows are drawn again, and every third of them alone, which gives the share of equal rows; with
--batch-invariant also by an engine with vllm.batch_invariant, which gives its price.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _random_model import SHAPES, random_rows, write_random_model
from _result import about, options, publish
from _smollm2 import smollm2

from qrpo_core.common.hashing import sample_seed
from qrpo_core.config.engines import VllmConfig
from qrpo_core.engines import vllm_child
from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.vllm import VllmEngine
from qrpo_core.engines.vllm_process import environment
from qrpo_core.engines.vllm_setup import interpreter, llm_arguments, visible_gpus
from qrpo_core.models.chat import Chat

GOAL = 0.97
SIDE = Path(__file__).resolve().with_name("_vllm_side.py")
TOPICS = ("rain", "a river", "the moon", "bread", "a violin", "sleep", "chess", "the sea", "ants", "winter")

Round = dict[str, float]


def draw_requests(prompts: list[tuple[int, ...]], samples: int) -> list[SampleRequest]:
    """`samples` requests of every prompt, those of a prompt together."""
    return [
        SampleRequest(str(number), index, ids, sample_seed(0, str(number), index))
        for number, ids in enumerate(prompts)
        for index in range(samples)
    ]


def questions(chat: Chat, count: int) -> list[tuple[int, ...]]:
    """So many prompts for a chat model."""
    texts = [
        f"Tell me {number + 1} things about {TOPICS[number % len(TOPICS)]}, in one sentence each."
        for number in range(count)
    ]
    return [tuple(chat.prompt_token_ids([{"role": "user", "content": text}])) for text in texts]


class Bare:
    """LLM.generate in the environment of vLLM; see _vllm_side.py."""

    def __init__(self, python: str, job: dict[str, Any], folder: Path) -> None:
        path = folder / "job.json"
        path.write_text(json.dumps(job))
        gpus = visible_gpus()
        self._log = folder / "bare.log"
        variables = environment(gpus, None)
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # as vLLM starts by itself
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-I", str(SIDE), str(path), vllm_child.__file__],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def load(self) -> None:
        """Load the model; until then the process only imports."""
        self._tell("")
        self._read()

    def round(self, seeds: str) -> Round:
        """Draw all requests; seeds : "seeded" or "unseeded"."""
        self._tell(seeds)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _read(self) -> Round:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"bare vLLM failed: {self._log.read_text(errors='replace')[-2000:]}")
        told: Round = json.loads(line)
        return told


def drawn_by(
    engine: VllmEngine, requests: list[SampleRequest], params: SamplingParams
) -> tuple[Round, list[Completion]]:
    """What a round took, and its rows."""
    started = time.perf_counter()
    rows = engine.sample(requests, params)
    return {"seconds": time.perf_counter() - started, "tokens": sum(len(row.token_ids) for row in rows)}, rows


def equal_share(one: list[Completion], other: list[Completion]) -> float:
    """The share of rows of equal tokens."""
    same = [a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)]
    return round(sum(same) / len(same), 4)


def rate(each: list[Round]) -> float:
    """Median tokens/s."""
    return statistics.median(told["tokens"] / told["seconds"] for told in each)


def summary(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Tokens/s and ratios of the rounds."""
    rates = {side: [told["tokens"] / told["seconds"] for told in each] for side, each in rounds.items()}
    ratios = {
        f"ours / {side}": [a / b for a, b in zip(rates["ours"], rates[side], strict=True)]
        for side in ("unseeded", "seeded")
    }
    return {
        "tokens_a_round": {side: [told["tokens"] for told in each] for side, each in rounds.items()},
        "tokens_per_second": {side: [round(each, 1) for each in found] for side, found in rates.items()},
        "ratios": {name: [round(each, 3) for each in found] for name, found in ratios.items()},
        "median_ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
    }


def invariant(
    directory: Path, config: VllmConfig, requests: list[SampleRequest], params: SamplingParams
) -> dict[str, Any]:
    """Tokens/s and equal rows of an engine with batch-invariant kernels."""
    engine = VllmEngine(directory, "bfloat16", config.model_copy(update={"batch_invariant": True}))
    try:
        drawn_by(engine, requests, params)
        taken, rows = drawn_by(engine, requests, params)
        return {
            "tokens_per_second": round(rate([taken]), 1),
            "equal_a_second_time": equal_share(drawn_by(engine, requests, params)[1], rows),
            "equal_in_other_company": equal_share(drawn_by(engine, requests[::3], params)[1], rows[::3]),
            "exact": engine.exact,
        }
    finally:
        engine.close()


def prepare(asked: argparse.Namespace, folder: Path) -> tuple[Path, list[SampleRequest], SamplingParams, int]:
    """The model's directory, the requests, how they are drawn, and the longest sequence."""
    if asked.random_model:
        directory = write_random_model(asked.random_model, folder / "model")
        rows = random_rows(asked.prompts, SHAPES[asked.random_model]["vocab_size"])
        prompts, stop, longest = [prompt for prompt, _ in rows], (), 1024
    else:
        directory = asked.model or smollm2()
        chat = Chat.load(directory)
        prompts = questions(chat, asked.prompts)
        stop, longest = chat.stop_token_ids, min(1024, chat.max_length)
    params = SamplingParams(1.0, 1.0, asked.max_new_tokens, stop)
    return directory, draw_requests(prompts, asked.samples), params, longest


def measure(asked: argparse.Namespace, head: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Both sides in turn, a round each; the first of either warms up. The result is written as it grows."""
    directory, requests, params, longest = prepare(asked, folder)
    config = VllmConfig(
        eager=asked.eager, engines=1, max_length=longest, gpu_memory_fraction=asked.gpu_memory_fraction
    )
    # With chunked prefill vLLM rewinds the generators of seeded rows; CPU generators cannot.
    on_cpu = {} if visible_gpus() else {"enable_chunked_prefill": False}
    job = {
        "arguments": llm_arguments(directory, "bfloat16", config, None)
        | {"skip_tokenizer_init": False}
        | on_cpu,
        "prompts": [request.prompt_token_ids for request in requests],
        "seeds": [request.seed % 2**63 for request in requests],
        "settings": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
        },
    }
    bare = Bare(interpreter(config), job, folder)
    began = time.perf_counter()
    engine = VllmEngine(directory, "bfloat16", config)
    facts = {"start_seconds": round(time.perf_counter() - began, 1), "engine": engine.name}
    facts |= {key: engine.facts[key] for key in ("runner", "max_sequences")}
    bare.load()
    rounds: dict[str, list[Round]] = {"ours": [], "unseeded": [], "seeded": []}
    result = head | {"requests": len(requests), "max_new_tokens": params.max_new_tokens} | facts
    rows: list[Completion] = []
    try:
        for number in range(-1, asked.rounds):
            taken, rows = drawn_by(engine, requests, params)
            pair = {"ours": taken} | {name: bare.round(name) for name in ("unseeded", "seeded")}
            for side, told in pair.items():
                if number >= 0:
                    rounds[side].append(told)
            if number >= 0:
                result |= summary(rounds)
                publish(result, asked.output, shown=f"round {number}: {result['median_ratio']}")
        bare.close()
        result |= {
            "equal_a_second_time": equal_share(drawn_by(engine, requests, params)[1], rows),
            "equal_in_other_company": equal_share(drawn_by(engine, requests[::3], params)[1], rows[::3]),
        }
    finally:
        engine.close()
    if asked.batch_invariant:
        publish(result, asked.output, shown="batch invariance")
        found = invariant(directory, config, requests, params)
        found["of_our_rate"] = round(found["tokens_per_second"] / rate(rounds["ours"]), 3)
        result["batch_invariant"] = found
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without compilation, on both sides")
    parser.add_argument(
        "--model", type=Path, help="a chat model's directory; SmolLM2-135M-Instruct by default"
    )
    parser.add_argument("--random-model", choices=SHAPES, help="a model of random weights instead")
    parser.add_argument("--batch-invariant", action="store_true", help="its price, too; NVIDIA GPUs only")
    parser.add_argument("--gpu-memory-fraction", type=float, default=0.4, help="of each of the two sides")
    asked = parser.parse_args()
    asked_versions = "import vllm, torch; print(vllm.__version__, torch.__version__)"
    told = subprocess.run(
        [interpreter(VllmConfig()), "-I", "-c", asked_versions], capture_output=True, text=True
    ).stdout.split()
    if len(told) < 2:
        sys.exit(f"no vLLM in {Path(interpreter(VllmConfig())).name}: make vllm-env, or pip install vllm")
    head = about(
        "vllm_sampling: VllmEngine.sample beside bare LLM.generate, the same requests",
        goals={"median_ratio": GOAL},
        versions_of_the_engine={"vllm": told[-2], "torch": told[-1]},
        eager=asked.eager,
    )
    with tempfile.TemporaryDirectory(prefix="qrpo-vllm-") as scratch:
        result = measure(asked, head, Path(scratch))
    publish(result, asked.output)


if __name__ == "__main__":
    main()
