"""Tokens/s of the engine vllm beside bare LLM.generate on the same requests, in the same environment.

    make bench-vllm
    python benchmarks/vllm_sampling.py [--prompts 16] [--samples 8] [--rounds 3] [--output FILE]

Both have SmolLM2-135M-Instruct loaded in bfloat16 (float32 on a CPU without it), in a process each, and draw
in turn: ours through `VllmEngine.sample` (requests handed to a child process, answers handed back and
checked), the other with one
`LLM.generate` of the same token ids, seeds, limits and log-probs. Loading and one round to warm up are not
counted. The other side runs as vLLM starts by itself, its core in a further process, with a tokenizer and
texts made; ours on the CPU has the core in the child and makes no texts. The ratio is of each round's
tokens/s; the goal is a median of 0.95.
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

from _result import command_line, hardware, publish
from _smollm2 import smollm2

from qrpo_core.data.chat import Chat
from qrpo_core.engines import vllm_child
from qrpo_core.engines.answers import seed_of
from qrpo_core.engines.base import SampleRequest, SamplingParams
from qrpo_core.engines.config import VllmConfig
from qrpo_core.engines.vllm import VllmEngine
from qrpo_core.engines.vllm_process import environment
from qrpo_core.engines.vllm_setup import interpreter, llm_arguments, visible_gpus
from qrpo_core.ids import sample_seed

GOAL = 0.95
SIDE = Path(__file__).resolve().with_name("_vllm_side.py")
TOPICS = ("rain", "a river", "the moon", "bread", "a violin", "sleep", "chess", "the sea", "ants", "winter")


def draw_requests(chat: Chat, prompts: int, samples: int) -> list[SampleRequest]:
    """`samples` requests of every prompt, those of a prompt together."""
    requests = []
    for number in range(prompts):
        text = f"Tell me {number + 1} things about {TOPICS[number % len(TOPICS)]}, in one sentence each."
        ids = chat.prompt_token_ids([{"role": "user", "content": text}])
        for index in range(samples):
            requests.append(SampleRequest(str(number), index, ids, sample_seed(0, str(number), index)))
    return requests


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
        self._read()

    def round(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"bare vLLM failed: {self._log.read_text(errors='replace')[-2000:]}")
        told: dict[str, float] = json.loads(line)
        return told


def ours_round(engine: VllmEngine, requests: list[SampleRequest], params: SamplingParams) -> dict[str, float]:
    started = time.perf_counter()
    drawn = engine.sample(requests, params)
    return {"seconds": time.perf_counter() - started, "tokens": sum(len(c.token_ids) for c in drawn)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides in turn, a round each; the first of either warms up."""
    directory = arguments.model or smollm2()
    chat = Chat.load(directory)
    requests = draw_requests(chat, arguments.prompts, arguments.samples)
    params = SamplingParams(1.0, 1.0, arguments.max_new_tokens, chat.stop_token_ids)
    config = VllmConfig(eager=arguments.eager, engines=1, max_length=min(1024, chat.max_length))
    job = {
        "arguments": llm_arguments(directory, "bfloat16", config, None) | {"skip_tokenizer_init": False},
        "prompts": [request.prompt_token_ids for request in requests],
        "seeds": [seed_of(request.seed) for request in requests],
        "settings": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
        },
    }
    engine = VllmEngine(directory, "bfloat16", config)
    bare = Bare(interpreter(config), job, folder)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    try:
        for number in range(-1, arguments.rounds):
            pair = {"ours": ours_round(engine, requests, params), "bare": bare.round()}
            for side, told in pair.items():
                if number >= 0:
                    rounds[side].append(told)
    finally:
        engine.close()
        bare.close()
    rates = {side: [told["tokens"] / told["seconds"] for told in each] for side, each in rounds.items()}
    ratios = [one / other for one, other in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "benchmark": "vllm_sampling: VllmEngine.sample beside bare LLM.generate, the same requests",
        "goal": {"median_ratio": GOAL},
        "requests": len(requests),
        "prompts": arguments.prompts,
        "max_new_tokens": params.max_new_tokens,
        "eager": arguments.eager,
        "engine": engine.name,
        "tokens_a_round": {side: [told["tokens"] for told in each] for side, each in rounds.items()},
        "tokens_per_second": {side: [round(rate, 1) for rate in each] for side, each in rates.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without compilation, on both sides")
    parser.add_argument("--model", type=Path, help="a model's directory instead of the demo's model")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="qrpo-vllm-") as scratch:
        result = measure(arguments, Path(scratch))
    versions = [
        interpreter(VllmConfig()),
        "-I",
        "-c",
        "import vllm, torch; print(vllm.__version__, torch.__version__)",
    ]
    told = subprocess.run(versions, capture_output=True, text=True, check=True).stdout.split()
    result |= {
        "hardware": machine,
        "versions_of_the_engine": {"vllm": told[-2], "torch": told[-1]},
        "command": command_line(),
    }
    publish(result, arguments.output)
    sys.exit(result["median_ratio"] < GOAL)


if __name__ == "__main__":
    main()
