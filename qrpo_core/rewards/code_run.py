"""One row: a program, its tests, and the two processes that settle how many of them it passes.

The examiner (`sandbox_examiner`) runs the tests and never loads judged code; the judged process
(`sandbox_judged`) runs the program and never sees an expected value. This harness carries questions and
replies between them, unread, and keeps the time. A reply counts if it carries the nonce of its question.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qrpo_core.rewards.code_environment import Environment
from qrpo_core.rewards.code_formats import Problem
from qrpo_core.rewards.sandbox import Limits, Mode, Sandbox, SandboxError
from qrpo_core.rewards.sandbox_channel import Broken, Ended, Late
from qrpo_core.rewards.sandbox_judged import NONCE

#: What the examiner may take beyond the limit of a test, for its own comparing.
EXAMINER_SECONDS = 5.0
#: The examiner holds decoded values, its own and the judged ones.
_EXAMINER = Limits(cpu_seconds=1 << 20, memory_bytes=2 << 30)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a program may use; see `CodeRewardConfig`."""

    seconds_per_test: float
    seconds_per_program: float
    memory_bytes: int

    @property
    def limits(self) -> Limits:
        """The system's limits. Those on processor time are a second line behind the clock's."""
        return Limits(math.ceil(self.seconds_per_program) + 1, self.memory_bytes)


@dataclass(slots=True)
class Outcome:
    """What became of a row.

    passed, total : tests.
    loaded : whether the program loaded.
    in_time : False if it was ended before every test had its turn.
    note : the first failure, in words.
    """

    total: int
    passed: int = 0
    loaded: bool = True
    in_time: bool = True
    note: str = ""


class SetupFailed(SandboxError):
    """The setup of the tests raised: a fault of the data set."""


class _NotLoaded(Exception):
    """The program raised, or ended, while it was loaded."""


class Bench:
    """A thread's examiner, used for one row after another. Belongs to the thread that uses it.

    `stop`, from any thread, ends what runs here and lets nothing more be started.
    """

    def __init__(self, mode: Mode, environment: Environment) -> None:
        self._mode = mode
        self._environment = environment
        self._examiner: Sandbox | None = None
        self._lock = threading.Lock()
        self._running: set[Sandbox] = set()
        self._stopped = False

    def start(self, role: Literal["judged", "examiner"], limits: Limits) -> Sandbox:
        """A sandbox that is up, ended by `end` or `stop`. Raises SandboxError if it does not come up."""
        sandbox = Sandbox(role, self._mode, limits, self._environment)
        with self._lock:
            self._running.add(sandbox)
            if self._stopped:
                sandbox.kill()
        try:
            sandbox.wait()
        except BaseException:
            self.end(sandbox)
            raise
        return sandbox

    def end(self, sandbox: Sandbox) -> None:
        """End a sandbox."""
        with self._lock:
            self._running.discard(sandbox)
        sandbox.close()

    def stop(self) -> None:
        """End all of them, from another thread: who waits for one meets a SandboxError."""
        with self._lock:
            self._stopped = True
            for sandbox in self._running:
                sandbox.kill()

    def judge(self, problem: Problem, source: str, allowance: Allowance) -> Outcome:
        """Run every test of a problem on a program. Raises SandboxError if the harness failed."""
        run = _Run(self, problem, source, allowance)
        try:
            return run.judge()
        except BaseException:
            self.close()
            raise
        finally:
            run.end_judged()

    def examiner(self, problem: Problem) -> Sandbox:
        """An examiner that knows the problem."""
        if self._examiner is None:
            self._examiner = self.start("examiner", _EXAMINER)
        form = {
            "setup": problem.examiner_setup,
            "tests": problem.tests,
            "names": problem.names,
            "classes": problem.classes,
            "entry": problem.entry,
        }
        reply = _asked(self._examiner, b"L" + json.dumps(form).encode("ascii"))
        if reply[:1] != b"D":
            raise SetupFailed(f"the tests' own setup failed: {reply[1:].decode('utf-8', 'replace')}")
        return self._examiner

    def importable(self, names: Sequence[str], limits: Limits, *, load: bool) -> dict[str, str]:
        """Why each of the modules cannot be imported in the environment; those that can are not in it.

        load : import them; otherwise they are only looked for.
        Raises SandboxError if the harness failed, or a module ends the process.
        """
        examiner = self.start("examiner", limits)
        try:
            reply = _asked(examiner, b"I" + json.dumps({"names": list(names), "load": load}).encode("ascii"))
        finally:
            self.end(examiner)
        return dict(json.loads(reply[1:]))

    def close(self) -> None:
        """End the examiner."""
        examiner, self._examiner = self._examiner, None
        if examiner:
            self.end(examiner)


def _asked(examiner: Sandbox, message: bytes) -> bytes:
    deadline = time.monotonic() + 60
    try:
        examiner.channel.send(message, deadline)
        return examiner.channel.receive(deadline)
    except (Ended, Late, Broken) as error:
        raise SandboxError(f"the examiner: {error}") from None


class _Run:
    """One row's way through its tests."""

    def __init__(self, bench: Bench, problem: Problem, source: str, allowance: Allowance) -> None:
        self._bench = bench
        self._problem = problem
        self._source = source
        self._allowance = allowance
        self._judged: Sandbox | None = None
        self._outcome = Outcome(len(problem.tests))
        self._end = 0.0

    def judge(self) -> Outcome:
        outcome = self._outcome
        examiner = self._bench.examiner(self._problem)
        self._end = time.monotonic() + self._allowance.seconds_per_program
        for number in range(outcome.total):
            if self._end <= time.monotonic():
                return self._stopped()
            try:
                self._load()
            except _NotLoaded as error:
                if not outcome.passed:
                    outcome.loaded = False
                self._note(number, f"the program did not load: {error}")
                return outcome
            except Late:
                return self._stopped()
            deadline = min(time.monotonic() + self._allowance.seconds_per_test, self._end)
            failure = self._test(examiner, number, deadline)
            if failure is None:
                outcome.passed += 1
                continue
            self._note(number, failure)
            if self._end <= time.monotonic():
                return self._stopped()
            if failure == _NO_END:
                examiner = self._bench.examiner(self._problem)
        return outcome

    def end_judged(self) -> None:
        judged, self._judged = self._judged, None
        if judged:
            self._bench.end(judged)

    def _stopped(self) -> Outcome:
        self.end_judged()
        self._outcome.in_time = False
        return self._outcome

    def _note(self, number: int, failure: str) -> None:
        if not self._outcome.note:
            self._outcome.note = f"test {number + 1}: {failure}"

    def _load(self) -> None:
        """Have a judged process with the program in it. Raises _NotLoaded, or Late if it takes too long."""
        if self._judged is not None:
            return
        problem = self._problem
        judged = self._bench.start("judged", self._allowance.limits)
        self._judged = judged
        deadline = min(time.monotonic() + self._allowance.seconds_per_test, self._end)
        form = {
            "format": problem.format,
            "setup": problem.judged_setup,
            "source": self._source,
            "entry": problem.entry,
            "classes": problem.classes,
        }
        nonce = os.urandom(NONCE)
        try:
            judged.channel.send(bytes(NONCE) + json.dumps(form).encode("ascii"), deadline)
            judged.channel.send(nonce, deadline)
            reply = judged.channel.receive(deadline)
        except (Ended, Broken) as error:
            self.end_judged()
            raise _NotLoaded(str(error)) from None
        if reply[: NONCE + 1] != nonce + b"+":
            self.end_judged()
            raise _NotLoaded(reply[NONCE + 1 :][:300].decode("utf-8", "replace"))

    def _test(self, examiner: Sandbox, number: int, deadline: float) -> str | None:
        """Run one test; None if it is passed, otherwise why not."""
        channel = examiner.channel
        try:
            channel.send(b"T%d" % number, deadline + EXAMINER_SECONDS)
            while True:
                message = channel.receive(deadline + EXAMINER_SECONDS)
                verdict, text = message[:1], message[1:]
                if verdict == b"C":
                    channel.send(self._answer(text, deadline), deadline + EXAMINER_SECONDS)
                elif verdict == b"P":
                    return None
                elif verdict == b"F":
                    return text.decode("utf-8", "replace")
                else:
                    raise SandboxError(f"test {number + 1}: {text.decode('utf-8', 'replace')}")
        except Late:
            self._bench.close()
            return _NO_END
        except (Ended, Broken) as error:
            raise SandboxError(f"the examiner: {error}") from None

    def _answer(self, question: bytes, deadline: float) -> bytes:
        """The judged process's reply to the examiner; what fails costs the process."""
        judged = self._judged
        if judged is None:
            return b"Xthe program had ended"
        nonce = os.urandom(NONCE)
        try:
            judged.channel.refuse_waiting()
            judged.channel.send(nonce + question, deadline)
            reply = judged.channel.receive(deadline)
            if reply[:NONCE] != nonce:
                raise Broken("its reply is to another question")
        except Late:
            self.end_judged()
            return f"Xno answer in {self._allowance.seconds_per_test:g} s".encode()
        except (Ended, Broken) as error:
            self.end_judged()
            return b"X" + str(error).encode()
        return b"V" + reply[NONCE:]


_NO_END = "the test itself did not end in time"
