"""The child processes of the engine vllm. They run in an environment with vLLM and without this project.

    python -I vllm_child.py watch PARENT DIE_WITH_PARENT    the watcher, which starts the server
    python -I vllm_child.py serve PARENT DIE_WITH_PARENT    the server, which has the model

The watcher kills the process group when the process PARENT ends, even if that was killed, or when the server
ends: vLLM starts further processes, which no other signal would reach. The watcher does not use the kernel's
parent-death signal, because that is sent when the starting *thread* ends, and engines outlive threads.

The protocol is JSON lines on standard input and output. vLLM's output goes to standard error, a log file.

    in   {"model": {...}, "adapters": {...} or null, "batch_invariant": bool}    first: arguments of LLM
    out  {"ready": {"device", "dtype", "vocab_size", "max_length", "runner", "max_sequences"}}
    in   {"do": "sample", "prompts": [[id, ...], ...], "rows": [[prompt, seed], ...], "params": {...}}
    in   {"do": "logprobs", "rows": [[[prompt ids], [completion ids]], ...]}
    out  {"rows": [[row, [id, ...], [logprob, ...]], ...]}      completion tokens, as rows finish
    out  {"done": true} after the last row, or {"error": "Type: message"}, and the process ends
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

POLL_SECONDS = 0.1
#: The class that draws in the runner V1, and the key of its arguments (see vllm_draw.py beside this file).
SEEDED_DRAW = "vllm_draw:SeededDraw"
SEEDED = "qrpo_seeded"


def watch(parent: int, die_with_parent: str) -> None:
    """Start the server; kill the process group when the server or the parent has ended."""
    command = [sys.executable, "-I", __file__, "serve", str(os.getpid()), die_with_parent]
    engine = subprocess.Popen(command, env=environment())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # the pipes to the parent must close when the server ends
    os.dup2(nothing, 1)
    while os.getppid() == parent and engine.poll() is None:
        time.sleep(POLL_SECONDS)
    if engine.returncode:
        how = signal.Signals(-engine.returncode).name if engine.returncode < 0 else engine.returncode
        print(f"the engine's process ended: {how}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def environment() -> dict[str, str]:
    """This environment, with libraries to preload on a CPU.

    Without them OpenMP binds threads to one core, and memory is slow (tcmalloc). Libraries that are in
    LD_PRELOAD already stay first.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return dict(os.environ)
    first = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    found = importlib.util.find_spec("vllm")
    packages = os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""
    wanted = {
        "libtcmalloc": [f"{packages}/vllm/libs/libtcmalloc*.so*", "/usr/lib/*/libtcmalloc_minimal.so*"],
        "omp": [f"{sys.prefix}/lib/libiomp5.so", f"{packages}/torch/lib/libgomp*.so*"],
    }
    for name, patterns in wanted.items():
        files = [file for pattern in patterns for file in sorted(glob.glob(pattern))]
        if files and not any(name in path for path in first):
            first.append(files[0])
    return {**os.environ, "LD_PRELOAD": ":".join(first)}


def serve() -> None:
    """Load the model and answer until standard input ends."""
    requests = os.fdopen(os.dup(0), encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # otherwise vLLM's output would be read as replies

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message, separators=(",", ":")), file=replies, flush=True)

    llm: Any = None
    try:
        settings = json.loads(requests.readline())
        llm, lora = load(settings)
        reply({"ready": facts(llm)})
        for line in requests:
            answer(llm, lora, json.loads(line), reply)
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"[:2000]})
        os._exit(1)
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # vLLM's threads must not keep the process alive


def load(settings: dict[str, Any]) -> tuple[Any, Any]:
    """vLLM's LLM, and the LoRA request to send with every row, or None."""
    if settings["batch_invariant"]:
        require_batch_invariance()
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = {**settings["model"], "disable_log_stats": True, "seed": 0}
    if runner(EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)) == "V1":
        # vLLM's processes find the module by its name; at the end of the path, ours hides none of theirs.
        sys.path.append(os.path.dirname(os.path.abspath(__file__)))
        arguments["logits_processors"] = [SEEDED_DRAW]
    llm = LLM(**arguments)
    if settings["adapters"] is None:
        return llm, None
    from vllm.lora.request import LoRARequest

    return llm, LoRARequest("policy", 1, settings["adapters"])


def require_batch_invariance() -> None:
    """Turn vLLM's batch-invariant kernels on. Raises RuntimeError for a device without them."""
    os.environ["VLLM_BATCH_INVARIANT"] = "1"  # before vLLM is imported; its own processes inherit it
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() and current_platform.has_device_capability(80)):
        raise RuntimeError("vllm.batch_invariant needs an NVIDIA GPU of compute capability 8.0 or more")


def runner(config: Any) -> str:
    """vLLM's model runner for its VllmConfig. V1 draws seeded rows one by one, V2 in one kernel."""
    return "V2" if getattr(config, "use_v2_model_runner", False) else "V1"


def facts(llm: Any) -> dict[str, Any]:
    """The facts of the `ready` message."""
    from vllm.platforms import current_platform

    config = llm.llm_engine.vllm_config
    return {
        "device": current_platform.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "vocab_size": config.model_config.get_vocab_size(),
        "max_length": config.model_config.max_model_len,
        "runner": runner(config),
        "max_sequences": config.scheduler_config.max_num_seqs,
    }


def answer(llm: Any, lora: Any, request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
    """Add all rows of a request to vLLM's engine, and reply with rows as they finish."""
    engine = llm.llm_engine
    sample = request["do"] == "sample"
    rows = sample_rows(request, runner(engine.vllm_config)) if sample else scored_rows(request)
    for row, (prompt, params) in enumerate(rows):
        tokens = {"type": "token", "prompt_token_ids": prompt}  # as vLLM's renderer would hand it over
        engine.add_request(str(row), tokens, params, lora_request=lora)
    read = read_sample if sample else read_logprobs
    while engine.has_unfinished_requests():
        outputs = [output for output in engine.step() if output.finished]
        if outputs:
            reply({"rows": [read(request, int(output.request_id), output) for output in outputs]})
    reply({"done": True})


def sample_rows(request: dict[str, Any], runner: str) -> Iterator[tuple[list[int], Any]]:
    """Prompt and SamplingParams of every row, seeded in the runner's way."""
    from vllm import SamplingParams

    asked, prompts = request["params"], request["prompts"]
    # The model's end tokens are in stop_token_ids.
    common = plain() | {name: asked[name] for name in ("max_tokens", "stop_token_ids")}
    for prompt, seed in request["rows"]:
        if runner == "V1":
            seeded = [seed, asked["temperature"], asked["top_p"]]
            params = SamplingParams(temperature=0.0, extra_args={SEEDED: seeded}, **common)
        else:
            chosen = {name: asked[name] for name in ("temperature", "top_p")}
            params = SamplingParams(seed=seed % 2**63, **chosen, **common)
        yield prompts[prompt], params


def read_sample(request: dict[str, Any], row: int, output: Any) -> list[Any]:
    drawn = output.outputs[0]
    return [row, list(drawn.token_ids), drawn_logprobs(drawn)]


def scored_rows(request: dict[str, Any]) -> Iterator[tuple[list[int], Any]]:
    """The last token is "drawn" with only itself allowed, so that sequences of full length fit. Log-probs
    are those before this restriction."""
    from vllm import SamplingParams

    for prompt, completion in request["rows"]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0 if len(completion) > 1 else None,
            allowed_token_ids=[completion[-1]],
            **plain(),
        )
        yield prompt + completion[:-1], params


def read_logprobs(request: dict[str, Any], row: int, output: Any) -> list[Any]:
    prompt, completion = request["rows"][row]
    last = output.outputs[0]
    if list(last.token_ids) != completion[-1:]:
        raise RuntimeError(
            f"row {row}: drew {list(last.token_ids)} where {completion[-1:]} alone was allowed"
        )
    values = []
    if len(completion) > 1:
        found = output.prompt_logprobs
        starts = found.start_indices[len(prompt) :]
        if [found.token_ids[start] for start in starts] != completion[:-1]:
            raise RuntimeError(f"row {row}: log-probs of other tokens than {completion[:-1]}")
        values = [found.logprobs[start] for start in starts]
    return [row, completion, [*values, *drawn_logprobs(last)]]


def drawn_logprobs(drawn: Any) -> list[float]:
    """The log-prob of each drawn token; `logprobs=0` gives no other token's."""
    if drawn.logprobs.token_ids != list(drawn.token_ids):
        raise RuntimeError("vLLM gave log-probs of other tokens than it drew")
    values: list[float] = drawn.logprobs.logprobs
    return values


def plain() -> dict[str, Any]:
    """Settings of every request: token ids without text, returned once at the end, with the log-probs of
    these tokens alone in lists of numbers (an object for each token costs vLLM more time than the draw)."""
    from vllm.sampling_params import RequestOutputKind

    return {
        "skip_clone": True,  # no other request has them
        "logprobs": 0,
        "flat_logprobs": True,
        "ignore_eos": True,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }


def main(role: str, parent: str, die_with_parent: str) -> None:
    """Run as the watcher or as the server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the group
    if role == "watch":
        watch(int(parent), die_with_parent)
    runpy.run_path(die_with_parent)["die_with_parent"](int(parent))
    serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
