"""The reward `code`: the fraction of a problem's tests that the program in a completion passes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.common.waits import as_completed
from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import GroundTruthProblem, RewardRequest, RowReward, Score, clip, refuse
from qrpo_core.rewards.code.environment import OF_PUBLIC_JUDGES, Environment, find_environment
from qrpo_core.rewards.code.formats import Problem, read_problem
from qrpo_core.rewards.code.programs import find_program
from qrpo_core.rewards.code.runner import Allowance, Bench, Outcome, SetupFailed
from qrpo_core.rewards.code.sandbox.bubblewrap import UNSAFE, Mode, SandboxError
from qrpo_core.rewards.code.sandbox.probe import find_mode

#: Number of tries of a row when the harness fails.
TRIES = 3

_ABSENT = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


class CodeReward(RowReward):
    """The fraction of tests passed, in [0, 1]; see docs/how-to/code-rewards.md.

    A completion without a program, a program that does not load and a test that fails or takes too long are
    `ok`: they lose the tests that they do not pass. Other statuses:

    timeout : the program did not finish loading, or the row's time ended before every test had run.
    sandbox_error : the harness failed three times.
    refused : the program imports a package that public judges have and this environment lacks.
    """

    _needs_ground_truth = True

    def __init__(self, config: CodeRewardConfig) -> None:
        self._config = config
        self._allowance = Allowance(
            config.seconds_per_test, config.seconds_per_program, config.memory_mb << 20
        )
        #: How programs are kept apart here; found with the first row.
        self.mode: Mode | None = None
        self._environment: Environment | None = None
        self._importable: dict[str, bool] = {}
        self._checked: set[str] = set()
        self._bench: Bench | None = None
        self._checking, self._within = threading.RLock(), 0
        self._problem = lru_cache(maxsize=1024)(lambda text: read_problem(text, config.format))

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return ground truths that have another format, import what programs cannot, or whose setup raises.

        Raises ConfigError on a machine without a sandbox (bubblewrap is missing or does not work, and
        `unsafe` is false), or if a package is not installed or does not load in the sandbox.
        """
        with self._examining():
            found = super().problems(ground_truths)
        self._prepare()
        return found

    def check_ground_truth(self, ground_truth: str) -> None:
        """Raise ValueError for a ground truth that cannot be graded."""
        if ground_truth in self._checked:
            return
        problem = self._problem(ground_truth)
        with self._examining():
            bench = self._bench = self._bench or self._new_bench()
            try:
                absent = ", ".join(self._absent(bench, problem.imports))
                if not absent:
                    bench.examiner(problem)
            except SetupFailed as error:
                raise ValueError(str(error)) from None
            except SandboxError:  # the harness failed, not the data: `score` tries each row
                bench.close()
                return
        if absent:
            raise ValueError(
                f"its tests, setup or solution import {absent}, which programs cannot import here; "
                f"install {absent} and list what is imported in reward.code.packages"
            )
        self._checked.add(ground_truth)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests. Calls `progress(1)` after each row.

        Raises DataError or ConfigError before anything runs (see `problems`).
        """
        refuse(self, ((request.prompt_id, request.ground_truth) for request in requests))
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
        """Return the score of one row."""
        return self.score([request])[0]

    @contextlib.contextmanager
    def _workers(self, rows: int) -> Iterator[tuple[ThreadPoolExecutor, _Benches]]:
        self._prepare()
        benches = _Benches(self._new_bench)
        threads = min(rows, self._config.processes or len(os.sched_getaffinity(0)))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="qrpo-code")
        try:
            yield pool, benches
        except BaseException:  # such as a keyboard interrupt: leave nothing running
            benches.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            benches.close()

    def _prepare(self) -> None:
        if self.mode is not None:
            return
        self._environment = find_environment(self._config)
        mode = find_mode(self._config.unsafe, self._environment)
        if self._config.packages:
            self._load_packages(Bench(mode, self._environment, self._allowance))
        self.mode = mode
        if mode == UNSAFE:
            warnings.warn(
                "reward.code.unsafe: programs run without a sandbox and can read and do whatever you can",
                stacklevel=2,
            )

    def _load_packages(self, bench: Bench) -> None:
        """Raise ConfigError for a package that does not load within the limits of a program."""
        try:
            failed = bench.not_loading(self._config.packages)
        except SandboxError as error:
            failed = {", ".join(self._config.packages): str(error)}
        for name, why in failed.items():
            raise ConfigError(
                f"package {name!r} cannot be imported in the sandbox ({clip(why, 200)})",
                where="reward.code.packages",
                remedy="install what it needs beside it, or raise reward.code.memory_mb",
            )

    def _new_bench(self) -> Bench:
        self._prepare()
        assert self.mode is not None
        assert self._environment is not None
        return Bench(self.mode, self._environment, self._allowance)

    @contextlib.contextmanager
    def _examining(self) -> Iterator[None]:
        """Share one bench among all checks of ground truths inside the block."""
        with self._checking:
            self._within += 1
            try:
                yield
            finally:
                self._within -= 1
                if not self._within and self._bench is not None:
                    self._bench.close()
                    self._bench = None

    def _absent(self, bench: Bench, modules: Sequence[str]) -> list[str]:
        """Return the modules that cannot be imported in the sandbox."""
        if unknown := [name for name in modules if name not in self._importable]:
            absent = bench.absent(unknown)
            self._importable |= {name: name not in absent for name in unknown}
        return [name for name in modules if not self._importable[name]]

    def _scored(self, request: RewardRequest, benches: _Benches) -> Score:
        assert request.ground_truth is not None  # `refuse` has seen to that
        problem: Problem = self._problem(request.ground_truth)
        source = find_program(request.text, problem.wanted, body=problem.format == "humaneval")
        if source is None:
            return Score(0.0, "ok", "no program in the completion: no block of Python, nor the entry point")
        for tried in range(1, TRIES + 1):
            if benches.stopped:
                return Score(None, "sandbox_error", "interrupted")
            try:
                outcome = benches.mine().judge(problem, source)
                return self._score_of(outcome, source)
            except (SandboxError, OSError) as error:
                failure = f"tried {tried} times: {error}"
        return Score(None, "sandbox_error", clip(failure))

    def _score_of(self, outcome: Outcome, source: str) -> Score:
        if absent := self._absent_package(outcome, source):
            detail = f"the program imports {absent}; to grade it, add it to reward.code.packages"
            return Score(None, "refused", detail)
        detail = f"passed {outcome.passed} of {outcome.total}"
        if self.mode == UNSAFE:
            detail += " (without a sandbox)"
        if outcome.note:
            detail += f"; {outcome.note}"
        if not outcome.in_time:
            return Score(None, "timeout", clip(f"ended before all tests were run; {detail}"))
        return Score(outcome.passed / outcome.total, "ok", clip(detail))

    def _absent_package(self, outcome: Outcome, source: str) -> str | None:
        """Return the package of public judges whose absence made the program fail, or None."""
        found = _ABSENT.search(outcome.note)
        if found is None or found[1] not in OF_PUBLIC_JUDGES.difference(self._config.packages):
            return None
        # The program could forge this message, so its text must import the package.
        imports = re.search(rf"^\s*(?:import|from)\s+{found[1]}\b", source, re.MULTILINE)
        return found[1] if imports else None


class _Benches:
    """One bench for each thread."""

    def __init__(self, new: Callable[[], Bench]) -> None:
        self._new = new
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[Bench] = []
        self.stopped = False

    def mine(self) -> Bench:
        """Return this thread's bench."""
        bench: Bench | None = getattr(self._local, "bench", None)
        if bench is None:
            bench = self._local.bench = self._new()
            with self._lock:
                self._all.append(bench)
                if self.stopped:
                    bench.stop()
        return bench

    def stop(self) -> None:
        """End everything that runs, and prevent further starts."""
        with self._lock:
            self.stopped = True
            for bench in self._all:
                bench.stop()

    def close(self) -> None:
        """End the examiners. Call it after all threads have ended."""
        for bench in self._all:
            bench.close()
