"""The `code` reward: the share of a problem's tests that the program in a completion passes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import ConfigError
from qrpo_core.rewards.base import ReferenceProblem, RewardRequest, RowReward, Score, clip, refuse
from qrpo_core.rewards.code_formats import Problem, first_block, read_problem
from qrpo_core.rewards.code_run import Allowance, Bench, Outcome
from qrpo_core.rewards.config import CodeRewardConfig
from qrpo_core.rewards.sandbox import Mode, SandboxError
from qrpo_core.rewards.sandbox_probe import find_mode

#: How often a row is tried when the harness, not the program, failed.
TRIES = 3


class CodeReward(RowReward):
    """Passed tests over tests, in [0, 1]; see docs/rewards-code.md for what is sure about it and what not.

    A completion without a fenced block, a program that does not load and a test that fails or takes too
    long are `ok`: they cost what they did not pass. Status `timeout`: the program did not finish loading,
    or the row's time ended before every test had its turn. `sandbox_error`: the harness failed three times.
    """

    _needs_reference = True

    def __init__(self, config: CodeRewardConfig) -> None:
        self._config = config
        self._allowance = Allowance(
            config.seconds_per_test, config.seconds_per_program, config.memory_mb << 20
        )
        self._mode: Mode | None = None
        self._packages: tuple[Path, ...] = ()
        self._problem = lru_cache(maxsize=1024)(lambda text: read_problem(text, config.format))

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """References that are not of the format.

        Raises ConfigError on a machine on which nothing can be run safely (bubblewrap is missing or does not
        work, and `unsafe` is false), or if a package is not installed.
        """
        found = super().problems(references)
        self._prepare()
        return found

    def check_reference(self, reference: str) -> None:
        """Raise ValueError, saying what is needed, for a reference that is not of the format."""
        self._problem(reference)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests; `progress(1)` after each row.

        Raises DataError or ConfigError before anything runs (see `problems`).
        """
        refuse(self, ((request.prompt_id, request.reference) for request in requests))
        if not requests:
            return []
        scores: dict[int, Score] = {}
        with self._workers(len(requests)) as (pool, benches):
            places = {pool.submit(self._scored, request, benches): i for i, request in enumerate(requests)}
            for future in as_completed(places):
                scores[places[future]] = future.result()
                progress(1)
        return [scores[place] for place in range(len(requests))]

    def score_row(self, request: RewardRequest) -> Score:
        """The score of one row."""
        return self.score([request])[0]

    @contextlib.contextmanager
    def _workers(self, rows: int) -> Iterator[tuple[ThreadPoolExecutor, _Benches]]:
        self._prepare()
        assert self._mode is not None
        benches = _Benches(self._mode, self._packages)
        threads = min(rows, self._config.processes or len(os.sched_getaffinity(0)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="qrpo-code")
        try:
            yield pool, benches
        except BaseException:  # a keyboard interrupt above all: nothing may be left running
            benches.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            benches.close()

    def _prepare(self) -> None:
        if self._mode is not None:
            return
        self._packages = tuple(_package(name) for name in self._config.packages)
        self._mode = find_mode(self._config.unsafe)
        if self._mode == "unsafe":
            warnings.warn(
                "reward.code.unsafe: programs run without a sandbox and can read and do whatever you can",
                stacklevel=2,
            )

    def _scored(self, request: RewardRequest, benches: _Benches) -> Score:
        source = first_block(request.text)
        assert request.reference is not None  # `refuse` has seen to that
        problem: Problem = self._problem(request.reference)
        if source is None:
            return Score(0.0, "ok", "no fenced block of Python in the completion")
        for tried in range(1, TRIES + 1):
            if benches.stopped:
                return Score(None, "sandbox_error", "interrupted")
            try:
                return self._score_of(benches.mine().judge(problem, source, self._allowance))
            except (SandboxError, OSError) as error:
                failure = f"tried {tried} times: {error}"
        return Score(None, "sandbox_error", clip(failure))

    def _score_of(self, outcome: Outcome) -> Score:
        detail = f"passed {outcome.passed} of {outcome.total}"
        if self._mode == "unsafe":
            detail += " (without a sandbox)"
        if outcome.note:
            detail += f"; {outcome.note}"
        if not outcome.in_time:
            return Score(None, "timeout", clip(f"ended before all tests were run; {detail}"))
        return Score(outcome.passed / outcome.total, "ok", clip(detail))


class _Benches:
    """One bench a thread."""

    def __init__(self, mode: Mode, packages: tuple[Path, ...]) -> None:
        self._mode = mode
        self._packages = packages
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[Bench] = []
        self.stopped = False

    def mine(self) -> Bench:
        """This thread's bench."""
        bench: Bench | None = getattr(self._local, "bench", None)
        if bench is None:
            bench = self._local.bench = Bench(self._mode, self._packages)
            with self._lock:
                self._all.append(bench)
                if self.stopped:
                    bench.stop()
        return bench

    def stop(self) -> None:
        """End what runs on any of them, and start nothing more."""
        with self._lock:
            self.stopped = True
            for bench in self._all:
                bench.stop()

    def close(self) -> None:
        """End the examiners; call it when no thread works any more."""
        for bench in self._all:
            bench.close()


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    for place in (found and found.submodule_search_locations) or ():
        return Path(place)
    raise ConfigError(
        f"package {name!r} is not installed",
        where="reward.code.packages",
        remedy=f"pip install {name}, or take it off the list",
    )
