"""The engine for scale: vLLM, in processes of its own and in an environment of its own."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo_core.engines.answers import checked_completion, checked_scores, seed_of
from qrpo_core.engines.base import (
    Completion,
    Progress,
    SampleRequest,
    SamplingParams,
    ScoreRequest,
    no_progress,
)
from qrpo_core.engines.batching import check_samples, check_scores
from qrpo_core.engines.config import VllmConfig
from qrpo_core.engines.vllm_process import VllmProcess
from qrpo_core.engines.vllm_setup import gpu_groups, interpreter, llm_arguments, require, visible_gpus
from qrpo_core.errors import EngineError

#: vLLM takes a lower temperature for this one.
_LOWEST_TEMPERATURE = 0.01


class VllmEngine:
    """Draws from and scores with the model of a directory, loaded once, for many calls.

    Parameters
    ----------
    directory : what `from_pretrained` loads.
    dtype : "bfloat16" or "float32", of weights and arithmetic; float32 on a CPU without bfloat16 of its own.
    config : see there. Each engine is a process group that ends when this process does, killed or not.
    adapters : LoRA adapters (peft's adapter_config.json and weights) that stand beside the model; they are
        used unmerged.

    Raises EngineError, naming the log, where an engine does not start, fails or dies. The next call starts
    what is missing anew. `exact` is False: a row's numbers depend on which rows are computed with it.
    """

    exact = False

    def __init__(
        self, directory: Path | str, dtype: str, config: VllmConfig, *, adapters: Path | str | None = None
    ) -> None:
        require(config)
        self._config = config
        self._groups = gpu_groups(config, visible_gpus())
        self._settings = {
            "model": llm_arguments(Path(directory), dtype, config, adapters),
            "adapters": None if adapters is None else str(Path(adapters).absolute()),
        }
        self._processes: list[VllmProcess | None] = [None] * len(self._groups)
        self._lock = threading.Lock()
        self._closed = False
        facts = self._start()
        self.name = "/".join(filter(None, ("vllm", facts["device"], facts["dtype"], config.quantization)))
        self._vocab_size, self._max_length = int(facts["vocab_size"]), int(facts["max_length"])

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion a request, in the order of the requests.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens` (it is never cut).
        """
        self._check_open()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        if params.temperature < _LOWEST_TEMPERATURE:
            raise EngineError(
                f"temperature {params.temperature} is below {_LOWEST_TEMPERATURE}, where vLLM takes another",
                where="sampling.temperature",
                remedy=f"give {_LOWEST_TEMPERATURE} or more, or use the engine transformers",
            )
        work = [len(request.prompt_token_ids) + params.max_new_tokens for request in requests]
        shares = deal([request.prompt_token_ids for request in requests], work, len(self._groups))
        drawn: list[Completion | None] = [None] * len(requests)

        def keep(row: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
            drawn[row] = checked_completion(requests[row], ids, logprobs, params)

        self._run(shares, lambda rows: _sample_line([requests[row] for row in rows], params), keep, progress)
        return [done for done in drawn if done is not None]

    def logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats, [sequences]: vLLM's float32 log-softmax, summed in float64."""
        rows = self.token_logprobs(sequences, progress, temperature)
        return np.array([scores.sum() for scores in rows], np.float64)

    def token_logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | what is before it) of every token of every completion, in nats."""
        self._check_open()
        check_scores(
            sequences,
            vocab_size=self._vocab_size,
            max_length=self._max_length,
            temperature=temperature,
            only_at_1=True,
        )
        found = [np.zeros(len(sequence.token_ids)) for sequence in sequences]
        asked = [row for row, sequence in enumerate(sequences) if sequence.token_ids]
        if len(asked) < len(sequences):
            progress(len(sequences) - len(asked))  # an empty completion asks nothing

        def keep(place: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
            found[asked[place]] = checked_scores(
                logprobs, len(sequences[asked[place]].token_ids), asked[place]
            )

        def line(places: Sequence[int]) -> dict[str, Any]:
            picked = [sequences[asked[place]] for place in places]
            return {"do": "score", "rows": [[s.prompt_token_ids, s.token_ids] for s in picked]}

        work = [len(sequences[row].prompt_token_ids) + len(sequences[row].token_ids) for row in asked]
        shares = deal([sequences[row].prompt_token_ids for row in asked], work, len(self._groups))
        self._run(shares, line, keep, progress)
        return found

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        self._closed = True
        for process in self._processes:
            if process is not None:
                process.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="make a new one")

    def _start(self) -> dict[str, Any]:
        """Start the processes that do not run, together, and wait until they are ready; what they told."""
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
        shares: Sequence[Sequence[int]],
        line: Callable[[Sequence[int]], dict[str, Any]],
        keep: Callable[[int, Sequence[int], Sequence[float]], None],
        progress: Progress,
    ) -> None:
        """Send every engine its share of rows and hand over what comes back until all are done."""
        busy = {number: rows for number, rows in enumerate(shares) if rows}
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
                self._kill()  # its later rows must not be taken for those of another call
                raise

    def _kill(self) -> None:
        for number, process in enumerate(self._processes):
            if process is not None:
                process.kill()
            self._processes[number] = None


def deal(prompts: Sequence[tuple[int, ...]], work: Sequence[int], engines: int) -> list[list[int]]:
    """Rows for each engine: those of one prompt together, so that it is read once, and the work balanced.

    prompts, work : of every row; work in any unit. Returns [engines] lists of rows.
    """
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        together[prompt].append(row)
    groups = sorted(together.values(), key=lambda rows: (-sum(work[row] for row in rows), rows[0]))
    shares: list[list[int]] = [[] for _ in range(engines)]
    loads = [0] * engines
    for rows in groups:
        lightest = loads.index(min(loads))
        shares[lightest] += rows
        loads[lightest] += sum(work[row] for row in rows)
    return shares


def _sample_line(requests: Sequence[SampleRequest], params: SamplingParams) -> dict[str, Any]:
    numbers: dict[tuple[int, ...], int] = {}
    rows = [
        [numbers.setdefault(request.prompt_token_ids, len(numbers)), seed_of(request.seed)]
        for request in requests
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
