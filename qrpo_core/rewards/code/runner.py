"""Run the tests of one row on its program, with two processes.

The examiner (`sandbox.examiner`) runs the tests and never loads the program. The judged process
(`sandbox.judged`) runs the program and never sees an expected value. This harness carries questions and
replies between them without reading them, and keeps the time. A reply counts only with the nonce of its
question.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qrpo_core.rewards.code.environment import Environment
from qrpo_core.rewards.code.formats import Problem
from qrpo_core.rewards.code.sandbox.bubblewrap import Limits, Mode, Sandbox, SandboxError
from qrpo_core.rewards.code.sandbox.channel import Broken, Ended, Late
from qrpo_core.rewards.code.sandbox.forked import Forked, ForkServer
from qrpo_core.rewards.code.sandbox.judged import NONCE

#: Extra seconds of the examiner beyond the limit of a test, for its comparisons.
EXAMINER_SECONDS = 5.0
#: The examiner holds decoded values of both sides, so it gets more memory.
_EXAMINER = Limits(cpu_seconds=1 << 20, memory_bytes=2 << 30)


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of a program; see `CodeRewardConfig`."""

    seconds_per_test: float
    seconds_per_program: float
    memory_bytes: int

    @property
    def limits(self) -> Limits:
        """The system's limits. The limit on processor time backs up the clock."""
        return Limits(math.ceil(self.seconds_per_program) + 1, self.memory_bytes)


@dataclass(slots=True)
class Outcome:
    """The result of a row.

    passed, total : numbers of tests.
    loaded : whether the program loaded.
    in_time : False if it ended before every test had run.
    note : the first failure, in words.
    """

    total: int
    passed: int = 0
    loaded: bool = True
    in_time: bool = True
    note: str = ""


class SetupFailed(SandboxError):
    """The setup of the tests raised: an error of the data set."""


class _NotLoaded(Exception):
    """The program raised or ended while it loaded."""


class Bench:
    """The sandboxes of one thread. Its examiner and its fork server serve one row after another.

    allowance : the limits of the programs.

    `stop`, from any thread, ends everything that runs here and prevents further starts.
    """

    def __init__(self, mode: Mode, environment: Environment, allowance: Allowance) -> None:
        self._mode = mode
        self._environment = environment
        self.allowance = allowance
        self._examiner: Sandbox | None = None
        self.server: ForkServer | None = None
        self._lock = threading.Lock()
        self._running: set[Sandbox] = set()
        self._stopped = False

    def program(self) -> Sandbox | Forked:
        """Return a process for one program; `end` or `stop` ends it. Raises SandboxError if there is none."""
        if not self._mode.forks:
            return self._up(Sandbox("judged", self._mode, self.allowance.limits, self._environment))
        if self.server is None:
            server = ForkServer(self._mode, self.allowance.limits, self._environment)
            self._up(server)
            self.server = server
        return self.server.fork()

    def _up(self, sandbox: Sandbox) -> Sandbox:
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

    def end(self, process: Sandbox | Forked) -> None:
        """End a process."""
        if isinstance(process, Sandbox):
            with self._lock:
                self._running.discard(process)
        process.close()

    def stop(self) -> None:
        """End all sandboxes, from another thread. A thread that waits for one gets a SandboxError."""
        with self._lock:
            self._stopped = True
            for sandbox in self._running:
                sandbox.kill()

    def judge(self, problem: Problem, source: str) -> Outcome:
        """Return the outcome of a problem's tests on a program. Raises SandboxError if the harness failed."""
        run = _Run(self, problem, source)
        try:
            return run.judge()
        except BaseException:
            self.close()
            raise
        finally:
            run.end_judged()

    def examiner(self, problem: Problem) -> Sandbox:
        """Return an examiner that has loaded the problem."""
        examiner = self._any_examiner()
        form = {
            "setup": problem.examiner_setup,
            "tests": problem.tests,
            "names": problem.names,
            "classes": problem.classes,
            "entry": problem.entry,
        }
        reply = _asked(examiner, b"L" + json.dumps(form).encode("ascii"))
        if reply[:1] != b"D":
            raise SetupFailed(f"the tests' own setup failed: {reply[1:].decode('utf-8', 'replace')}")
        return examiner

    def absent(self, names: Sequence[str]) -> set[str]:
        """Return the modules that are not in the environment; none is imported."""
        return set(_importable(self._any_examiner(), names, load=False))

    def not_loading(self, names: Sequence[str]) -> dict[str, str]:
        """Return the reason for each module that cannot be imported within the limits of a program.

        Raises SandboxError if the harness failed, or a module ends the process.
        """
        examiner = self._up(Sandbox("examiner", self._mode, self.allowance.limits, self._environment))
        try:
            return _importable(examiner, names, load=True)
        finally:
            self.end(examiner)

    def end_examiner(self) -> None:
        """End the examiner; the next row gets a new one."""
        examiner, self._examiner = self._examiner, None
        if examiner:
            self.end(examiner)

    def close(self) -> None:
        """End everything that lives on."""
        self.end_examiner()
        server, self.server = self.server, None
        if server:
            self.end(server)

    def _any_examiner(self) -> Sandbox:
        if self._examiner is None:
            self._examiner = self._up(Sandbox("examiner", self._mode, _EXAMINER, self._environment))
        return self._examiner


def _importable(examiner: Sandbox, names: Sequence[str], *, load: bool) -> dict[str, str]:
    reply = _asked(examiner, b"I" + json.dumps({"names": list(names), "load": load}).encode("ascii"))
    return dict(json.loads(reply[1:]))


def _asked(examiner: Sandbox, message: bytes) -> bytes:
    deadline = time.monotonic() + 60
    try:
        examiner.channel.send(message, deadline)
        return examiner.channel.receive(deadline)
    except (Ended, Late, Broken) as error:
        raise SandboxError(f"the examiner: {error}") from None


class _Run:
    """The run of one row."""

    def __init__(self, bench: Bench, problem: Problem, source: str) -> None:
        self._bench = bench
        self._problem = problem
        self._source = source
        self._allowance = bench.allowance
        self._judged: Sandbox | Forked | None = None
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
        """Start a judged process and load the program. Raises _NotLoaded, or Late if it takes too long."""
        if self._judged is not None:
            return
        problem = self._problem
        judged = self._judged = self._bench.program()
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
        """Run one test. Return None if it passes, else the reason."""
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
            self._bench.end_examiner()
            return _NO_END
        except (Ended, Broken) as error:
            raise SandboxError(f"the examiner: {error}") from None

    def _answer(self, question: bytes, deadline: float) -> bytes:
        """Return the judged process's reply to the examiner. A failure ends the process."""
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
