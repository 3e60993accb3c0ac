"""Bare vLLM's side of vllm_sampling.py, run in the environment that has vLLM.

    python _vllm_side.py JOB CHILD

JOB: arguments of LLM, prompts (token ids), seeds and settings of the requests. CHILD: our vllm_child.py,
which knows the libraries that are to be loaded first; nothing else of ours is used.

Imports vLLM, waits for a line, loads the model, says so, and then draws all requests with one LLM.generate
whenever a line comes in, with seeds if the line is "seeded"; a line of JSON (seconds, tokens) goes out each
time.
"""

import json
import os
import runpy
import sys
import time


def main():
    wanted = runpy.run_path(sys.argv[2])["environment"]()
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-I", *sys.argv], wanted)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    with open(sys.argv[1]) as file:
        job = json.load(file)
    if not sys.stdin.readline():
        return
    llm = LLM(**job["arguments"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    seeded = [SamplingParams(seed=seed, **job["settings"]) for seed in job["seeds"]]
    unseeded = [SamplingParams(**job["settings"]) for _ in job["seeds"]]
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        params = seeded if line.strip() == "seeded" else unseeded
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=replies, flush=True)


if __name__ == "__main__":
    main()
