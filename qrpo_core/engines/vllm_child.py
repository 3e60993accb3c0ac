"""The processes of the engine vllm, in an environment that has vLLM and nothing of this project.

    python -I vllm_child.py watch PARENT DIE_WITH_PARENT    the one that is started: keeps an eye on the other
    python -I vllm_child.py serve PARENT DIE_WITH_PARENT    the one with the model

The watcher ends the whole process group when the process that started it (PARENT) is gone, killed or not, or
when the engine is: vLLM starts processes of its own, which no other signal would reach. It does not use the
parent's death signal itself, since that is sent when the starting *thread* ends, and engines outlive threads.

JSON lines on standard input and output; all that vLLM prints goes to standard error, which is a log file.

    in   {"model": {...}, "adapters": {...} or null}            the first line: arguments of LLM
    out  {"ready": {"device", "dtype", "vocab_size", "max_length"}}
    in   {"do": "sample", "prompts": [[id, ...], ...], "rows": [[prompt, seed], ...], "params": {...}}
    in   {"do": "score", "rows": [[[prompt ids], [completion ids]], ...]}
    out  {"rows": [[row, [id, ...], [logprob, ...]], ...]}      as rows finish: tokens of the completion
    out  {"done": true} after the last row; {"error": "Type: message"} instead, and the process ends
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
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.1


def watch(parent: int, die_with_parent: str) -> None:
    """Start the engine's process; end the group when it has ended, or the parent has."""
    command = [sys.executable, "-I", __file__, "serve", str(os.getpid()), die_with_parent]
    engine = subprocess.Popen(command, env=environment())
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # the parent's end of either pipe must close with the engine alone
    os.dup2(nothing, 1)
    while os.getppid() == parent and engine.poll() is None:
        time.sleep(POLL_SECONDS)
    if engine.returncode:
        how = signal.Signals(-engine.returncode).name if engine.returncode < 0 else engine.returncode
        print(f"the engine's process ended: {how}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def environment() -> dict[str, str]:
    """On the CPU: libraries that must be loaded first, or threads are bound to one core (OpenMP) and memory
    is slow (tcmalloc). What stands in LD_PRELOAD already stays first."""
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
    os.dup2(2, 1)  # what vLLM prints would be read as a reply

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
    os._exit(0)  # threads of vLLM's must not keep the process


def load(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The engine, and the adapters to use with every request."""
    from vllm import LLM

    llm = LLM(**settings["model"], disable_log_stats=True, seed=0)
    if settings["adapters"] is None:
        return llm, None
    from vllm.lora.request import LoRARequest

    return llm, LoRARequest("policy", 1, settings["adapters"])


def facts(llm: Any) -> dict[str, Any]:
    """What the parent wants to know of the model."""
    from vllm.platforms import current_platform

    config = llm.llm_engine.model_config
    return {
        "device": current_platform.device_type,
        "dtype": str(config.dtype).removeprefix("torch."),
        "vocab_size": config.get_vocab_size(),
        "max_length": config.max_model_len,
    }


def answer(llm: Any, lora: Any, request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
    """Run one request through the engine's own loop, all rows at once, telling rows as they finish."""
    add, read = (add_sample, read_sample) if request["do"] == "sample" else (add_score, read_score)
    engine = llm.llm_engine
    for row in range(len(request["rows"])):
        prompt, params = add(request, row)
        engine.add_request(str(row), {"prompt_token_ids": prompt}, params, lora_request=lora)
    while engine.has_unfinished_requests():
        outputs = [output for output in engine.step() if output.finished]
        if outputs:
            reply({"rows": [read(request, int(output.request_id), output) for output in outputs]})
    reply({"done": True})


def add_sample(request: dict[str, Any], row: int) -> tuple[list[int], Any]:
    from vllm import SamplingParams

    prompt, seed = request["rows"][row]
    # logprobs=0: of the drawn token alone. The model's end tokens are among stop_token_ids.
    params = SamplingParams(seed=seed, logprobs=0, ignore_eos=True, **plain(), **request["params"])
    return request["prompts"][prompt], params


def read_sample(request: dict[str, Any], row: int, output: Any) -> list[Any]:
    drawn = output.outputs[0]
    ids = list(drawn.token_ids)
    return [row, ids, [each[i].logprob for i, each in zip(ids, drawn.logprobs, strict=True)]]


def add_score(request: dict[str, Any], row: int) -> tuple[list[int], Any]:
    """The last token is "drawn" with no other allowed, so that the longest sequences fit as well; the
    log-probs are those of the model before that."""
    from vllm import SamplingParams

    prompt, completion = request["rows"][row]
    params = SamplingParams(
        max_tokens=1,
        logprobs=0,
        prompt_logprobs=0 if len(completion) > 1 else None,
        allowed_token_ids=[completion[-1]],
        ignore_eos=True,
        **plain(),
    )
    return prompt + completion[:-1], params


def read_score(request: dict[str, Any], row: int, output: Any) -> list[Any]:
    prompt, completion = request["rows"][row]
    last = output.outputs[0]
    if list(last.token_ids) != completion[-1:]:
        raise RuntimeError(
            f"row {row}: drew {list(last.token_ids)} where {completion[-1:]} alone was allowed"
        )
    places = output.prompt_logprobs[len(prompt) :] if len(completion) > 1 else []
    scores = [place[i].logprob for i, place in zip(completion[:-1], places, strict=True)]
    return [row, completion, [*scores, last.logprobs[0][completion[-1]].logprob]]


def plain() -> dict[str, Any]:
    """Settings of every request: tokens only, told once, at the end."""
    from vllm.sampling_params import RequestOutputKind

    return {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}


def main(role: str, parent: str, die_with_parent: str) -> None:
    """Be the watcher or the engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then ends the group
    if role == "watch":
        watch(int(parent), die_with_parent)
    runpy.run_path(die_with_parent)["die_with_parent"](int(parent))
    serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
