"""The `code` reward: the share of a problem's tests that the program in a completion passes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import ConfigError
from qrpo_core.rewards.base import ReferenceProblem, RewardRequest, RowReward, Score, clip, refuse
from qrpo_core.rewards.code_blocks import find_program
from qrpo_core.rewards.code_environment import OF_PUBLIC_JUDGES, Environment, find_environment
from qrpo_core.rewards.code_formats import Problem, read_problem
from qrpo_core.rewards.code_run import Allowance, Bench, Outcome, SetupFailed
from qrpo_core.rewards.config import CodeRewardConfig
from qrpo_core.rewards.sandbox import Mode, SandboxError
from qrpo_core.rewards.sandbox_probe import find_mode

#: How often a row is tried when the harness, not the program, failed.
TRIES = 3

_ABSENT = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


class CodeReward(RowReward):
    """Passed tests over tests, in [0, 1]; see docs/rewards-code.md for what is sure about it and what not.

    A completion without a program, a program that does not load and a test that fails or takes too
    long are `ok`: they cost what they did not pass. Status `timeout`: the program did not finish loading,
    or the row's time ended before every test had its turn. `sandbox_error`: the harness failed three times.
    `refused`: the program imports a package that public judges have and this environment lacks.
    """

    _needs_reference = True

    def __init__(self, config: CodeRewardConfig) -> None:
        self._config = config
        self._allowance = Allowance(
            config.seconds_per_test, config.seconds_per_program, config.memory_mb << 20
        )
        self._mode: Mode | None = None
        self._environment: Environment | None = None
        self._importable: dict[str, bool] = {}
        self._checked: set[str] = set()
        self._bench: Bench | None = None
        self._checking, self._within = threading.RLock(), 0
        self._problem = lru_cache(maxsize=1024)(lambda text: read_problem(text, config.format))

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """References that are not of the format, import what programs cannot, or whose setup raises.

        Raises ConfigError on a machine on which nothing can be run safely (bubblewrap is missing or does not
        work, and `unsafe` is false), or if a package is not installed or does not load in the sandbox.
        """
        with self._examining():
            found = super().problems(references)
        self._prepare()
        return found

    def check_reference(self, reference: str) -> None:
        """Raise ValueError, saying what is needed, for a reference that cannot be graded."""
        if reference in self._checked:
            return
        problem = self._problem(reference)
        with self._examining():
            bench = self._bench = self._bench or self._new_bench()
            try:
                absent = ", ".join(self._absent(bench, problem.imports))
                if not absent:
                    bench.examiner(problem)
            except SetupFailed as error:
                raise ValueError(str(error)) from None
            except SandboxError:  # the harness, not the data: each row is tried for itself
                bench.close()
                return
        if absent:
            raise ValueError(
                f"its tests, setup or solution import {absent}, which programs cannot import here; "
                f"install {absent} and list what is imported in reward.code.packages"
            )
        self._checked.add(reference)

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
        benches = _Benches(self._new_bench)
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
        self._environment = find_environment(self._config)
        mode = find_mode(self._config.unsafe)
        if self._config.packages:
            self._load_packages(Bench(mode, self._environment))
        self._mode = mode
        if mode == "unsafe":
            warnings.warn(
                "reward.code.unsafe: programs run without a sandbox and can read and do whatever you can",
                stacklevel=2,
            )

    def _load_packages(self, bench: Bench) -> None:
        """Raise ConfigError for a package that does not load under the limits of a program."""
        try:
            failed = bench.importable(self._config.packages, self._allowance.limits, load=True)
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
        assert self._mode is not None
        assert self._environment is not None
        return Bench(self._mode, self._environment)

    @contextlib.contextmanager
    def _examining(self) -> Iterator[None]:
        """References are looked at: one bench for all that are within."""
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
        """Those of the modules that cannot be imported in the sandbox."""
        if unknown := [name for name in modules if name not in self._importable]:
            failed = bench.importable(unknown, self._allowance.limits, load=False)
            self._importable |= {name: name not in failed for name in unknown}
        return [name for name in modules if not self._importable[name]]

    def _scored(self, request: RewardRequest, benches: _Benches) -> Score:
        assert request.reference is not None  # `refuse` has seen to that
        problem: Problem = self._problem(request.reference)
        source = find_program(request.text, problem.wanted, body=problem.format == "humaneval")
        if source is None:
            return Score(0.0, "ok", "no program in the completion: no block of Python, nor the entry point")
        for tried in range(1, TRIES + 1):
            if benches.stopped:
                return Score(None, "sandbox_error", "interrupted")
            try:
                outcome = benches.mine().judge(problem, source, self._allowance)
                return self._score_of(outcome, source)
            except (SandboxError, OSError) as error:
                failure = f"tried {tried} times: {error}"
        return Score(None, "sandbox_error", clip(failure))

    def _score_of(self, outcome: Outcome, source: str) -> Score:
        if absent := self._absent_package(outcome, source):
            told = f"the program imports {absent}; to grade it, add it to reward.code.packages"
            return Score(None, "refused", told)
        detail = f"passed {outcome.passed} of {outcome.total}"
        if self._mode == "unsafe":
            detail += " (without a sandbox)"
        if outcome.note:
            detail += f"; {outcome.note}"
        if not outcome.in_time:
            return Score(None, "timeout", clip(f"ended before all tests were run; {detail}"))
        return Score(outcome.passed / outcome.total, "ok", clip(detail))

    def _absent_package(self, outcome: Outcome, source: str) -> str | None:
        """A package of public judges that the program failed for, because it is not there."""
        found = _ABSENT.search(outcome.note)
        if found is None or found[1] not in OF_PUBLIC_JUDGES.difference(self._config.packages):
            return None
        # The program's process says it: believed only of what the program's text imports.
        imports = re.search(rf"^\s*(?:import|from)\s+{found[1]}\b", source, re.MULTILINE)
        return found[1] if imports else None


class _Benches:
    """One bench a thread."""

    def __init__(self, new: Callable[[], Bench]) -> None:
        self._new = new
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[Bench] = []
        self.stopped = False

    def mine(self) -> Bench:
        """This thread's bench."""
        bench: Bench | None = getattr(self._local, "bench", None)
        if bench is None:
            bench = self._local.bench = self._new()
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
