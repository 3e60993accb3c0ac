"""The engine for large models: vLLM, in child processes with their own Python environment."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import EngineError
from qrpo_core.common.local_copies import Hold
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.engines import VllmConfig
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.validation import (
    check_logprob_requests,
    check_samples,
    checked_completion,
    checked_logprobs,
)
from qrpo_core.engines.vllm_process import VllmProcess
from qrpo_core.engines.vllm_setup import gpu_groups, interpreter, llm_arguments, require, visible_gpus

#: vLLM silently raises lower temperatures to this one.
_LOWEST_TEMPERATURE = 0.01
#: Of the test whether rows depend on their company: rows, most tokens of a prompt, tokens of a completion.
_TEST_ROWS, _TEST_PROMPT, _TEST_TOKENS = 256, 300, 16

_logger = logging.getLogger("qrpo.vllm")


class VllmEngine(Engine):
    """Draws from and scores with the model of a directory, which each child process loads once.

    Parameters
    ----------
    directory : a model directory for `from_pretrained`.
    dtype : "bfloat16" or "float32", of weights and arithmetic; a CPU without native bfloat16 uses float32.
    config : how many processes, on which GPUs. Each is a process group that ends with this process, even if
        this process is killed.
    adapters : directory of LoRA adapters (peft's adapter_config.json and weights) to apply unmerged.

    `facts` has what the processes said when they were ready (see `vllm_child`): vLLM's model runner, which
    decides how rows are seeded, the sequences decoded at a time, the device.

    Raises EngineError, naming the log, if a child process does not start, fails or dies. The next call
    restarts it. `exact` is False, because a row's numbers depend on the rows computed with it. With
    `vllm.batch_invariant` they do not: then `exact` is what a test on this machine has shown.
    """

    def __init__(
        self, directory: Path | str, dtype: str, config: VllmConfig, *, adapters: Path | str | None = None
    ) -> None:
        require(config)
        self._config = config
        self._groups = gpu_groups(config, visible_gpus())
        model = llm_arguments(Path(directory), dtype, config, adapters)
        self._settings = {
            "model": model,
            "adapters": None if adapters is None else str(Path(adapters).absolute()),
            "batch_invariant": config.batch_invariant,
        }
        # A process that ended is started again, and loads it again.
        self._held = [Hold(Path(given)) for given in (model["model"], adapters) if given is not None]
        self._processes: list[VllmProcess | None] = [None] * len(self._groups)
        self._lock = threading.Lock()
        self._closed = False
        facts = self._start()
        self.name = "/".join(filter(None, ("vllm", facts["device"], facts["dtype"], config.quantization)))
        self._vocab_size, self._max_length = int(facts["vocab_size"]), int(facts["max_length"])
        self.facts = facts
        self.exact = config.batch_invariant and self.rows_are_alone()
        if config.batch_invariant and not self.exact:
            _logger.warning("rows differ in other company although vllm.batch_invariant is true")

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion for each request, in their order.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens`; prompts are never cut.
        """
        self._check_open()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        if params.temperature < _LOWEST_TEMPERATURE:
            raise EngineError(
                f"temperature {params.temperature} is below {_LOWEST_TEMPERATURE}, and vLLM would raise it",
                where="sampling.temperature",
                remedy=f"give {_LOWEST_TEMPERATURE} or more, or use the engine transformers",
            )
        work = [len(request.prompt_token_ids) + params.max_new_tokens for request in requests]
        shards = split_rows([request.prompt_token_ids for request in requests], work, len(self._groups))
        drawn: list[Completion | None] = [None] * len(requests)

        def keep(row: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
            drawn[row] = checked_completion(requests[row], ids, logprobs, params)

        self._run(shards, lambda rows: _sample_line([requests[row] for row in rows], params), keep, progress)
        return [done for done in drawn if done is not None]

    def token_logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | preceding tokens) in nats, an array for each completion; float32 log-softmax."""
        self._check_open()
        check_logprob_requests(
            sequences,
            vocab_size=self._vocab_size,
            max_length=self._max_length,
            temperature=temperature,
            only_at_1=True,
        )
        logprobs = [np.zeros(len(sequence.token_ids)) for sequence in sequences]
        rows = [row for row, sequence in enumerate(sequences) if sequence.token_ids]
        if len(rows) < len(sequences):
            progress(len(sequences) - len(rows))  # empty completions need no request

        def keep(place: int, ids: Sequence[int], found: Sequence[float]) -> None:
            row = rows[place]
            logprobs[row] = checked_logprobs(found, len(sequences[row].token_ids), row)

        def line(places: Sequence[int]) -> dict[str, Any]:
            picked = [sequences[rows[place]] for place in places]
            return {"do": "logprobs", "rows": [[s.prompt_token_ids, s.token_ids] for s in picked]}

        work = [len(sequences[row].prompt_token_ids) + len(sequences[row].token_ids) for row in rows]
        shards = split_rows([sequences[row].prompt_token_ids for row in rows], work, len(self._groups))
        self._run(shards, line, keep, progress)
        return logprobs

    def rows_are_alone(self) -> bool:
        """Whether rows drawn alone and among others are equal, tokens and log-probs bit for bit: a test."""
        random = np.random.default_rng(0)
        params = SamplingParams(1.0, 1.0, min(_TEST_TOKENS, self._max_length - 1), ())
        longest = min(_TEST_PROMPT, self._max_length - params.max_new_tokens)
        rows = [
            SampleRequest("test", row, tuple(random.integers(0, self._vocab_size, length).tolist()), row)
            for row, length in enumerate(random.integers(1, longest + 1, _TEST_ROWS))
        ]
        alone = [done for row in rows[:: _TEST_ROWS // 8] for done in self.sample([row], params)]
        return self.sample(rows, params)[:: _TEST_ROWS // 8] == alone

    def close(self) -> None:
        """End the child processes."""
        self._closed = True
        for process in self._processes:
            if process is not None:
                process.close()
        for held in self._held:
            held.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="make a new one")

    def _start(self) -> dict[str, Any]:
        """Start the processes that do not run and wait for them; returns a model's facts, {} if all ran."""
        python = interpreter(self._config)
        threads = max(1, len(os.sched_getaffinity(0)) // len(self._groups))
        fresh: dict[int, VllmProcess] = {}
        facts: dict[str, Any] = {}
        deadline = time.monotonic() + 60 * self._config.startup_minutes
        try:
            for number, process in enumerate(self._processes):
                if process is None or not process.alive:
                    fresh[number] = VllmProcess(
                        python, self._settings, gpus=self._groups[number], threads=threads
                    )
                    self._processes[number] = fresh[number]
            for process in fresh.values():
                message = process.receive(max(0.0, deadline - time.monotonic()))
                if message is None:
                    raise process.failed(f"not ready after {self._config.startup_minutes} minutes")
                facts = message["ready"]
        except BaseException:
            self._kill()
            raise
        return facts

    def _run(
        self,
        shards: Sequence[Sequence[int]],
        line: Callable[[Sequence[int]], dict[str, Any]],
        keep: Callable[[int, Sequence[int], Sequence[float]], None],
        progress: Progress,
    ) -> None:
        """Send every process its shard of rows, and call `keep` with each answer until all rows are done."""
        busy = {number: rows for number, rows in enumerate(shards) if rows}
        missing = {row for rows in busy.values() for row in rows}
        if not missing:
            return
        with self._lock:
            self._start()
            processes = {number: self._processes[number] for number in busy}
            try:
                for number, process in processes.items():
                    assert process is not None
                    process.send(line(busy[number]))
                while processes:
                    for number, process in list(processes.items()):
                        assert process is not None
                        message = process.receive(1.0 if len(processes) == 1 else 0.02)
                        if message is None:
                            continue
                        if "done" in message:
                            del processes[number]
                            continue
                        for place, ids, logprobs in message["rows"]:
                            missing.remove(busy[number][place])
                            keep(busy[number][place], ids, logprobs)
                        progress(len(message["rows"]))
                if missing:
                    raise EngineError(
                        f"vLLM gave no answer for {len(missing)} rows, the first {min(missing)}"
                    )
            except BaseException:
                self._kill()  # otherwise the next call would read this call's late rows
                raise

    def _kill(self) -> None:
        for number, process in enumerate(self._processes):
            if process is not None:
                process.kill()
            self._processes[number] = None


def split_rows(prompts: Sequence[tuple[int, ...]], work: Sequence[int], engines: int) -> list[list[int]]:
    """Lists of rows, one for each engine. Equal prompts stay together (vLLM reads them once), work is even.

    prompts, work : of every row; work in any unit.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_prompt[prompt].append(row)
    groups = sorted(by_prompt.values(), key=lambda rows: (-sum(work[row] for row in rows), rows[0]))
    shards: list[list[int]] = [[] for _ in range(engines)]
    loads = [0] * engines
    for rows in groups:
        lightest = loads.index(min(loads))
        shards[lightest] += rows
        loads[lightest] += sum(work[row] for row in rows)
    return shards


def _sample_line(requests: Sequence[SampleRequest], params: SamplingParams) -> dict[str, Any]:
    numbers: dict[tuple[int, ...], int] = {}
    rows = [
        [numbers.setdefault(request.prompt_token_ids, len(numbers)), request.seed] for request in requests
    ]
    return {
        "do": "sample",
        "prompts": list(numbers),
        "rows": rows,
        "params": {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
        },
    }
