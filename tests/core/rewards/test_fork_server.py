"""Programs that are forked: what they see of each other, what ends with them, and verdicts both ways."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.inspection import doctor
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.code.environment import own_environment
from qrpo_core.rewards.code.formats import read_problem
from qrpo_core.rewards.code.reward import CodeReward
from qrpo_core.rewards.code.runner import Allowance, Bench, Outcome
from qrpo_core.rewards.code.sandbox.bubblewrap import Sandbox, SandboxError, modes
from qrpo_core.rewards.code.sandbox.forked import Forked
from qrpo_core.rewards.code.sandbox.probe import find_mode
from qrpo_core.rewards.code.sandbox.wire import decode, dump, encode, parse
from tests.core.rewards.code_problems import SQUARES, mbpp, needs_bwrap, request
from tests.core.rewards.test_code import DATA, solutions

pytestmark = needs_bwrap

ALLOWANCE = Allowance(seconds_per_test=20.0, seconds_per_program=60.0, memory_bytes=512 << 20)
GOOD = "def f(x): return x * x"

#: What a program can see of the system that runs it.
FACTS = """
import os, resource, signal, socket, sys
def deep(n=0):
    try: return deep(n + 1)
    except RecursionError: return n
def status():
    wanted = ("Umask", "Groups", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp", "SigIgn", "SigCgt",
              "Threads", "NSpid", "NSsid", "NSpgid")
    fields = [line.split(":", 1) for line in open("/proc/self/status")]
    return {name: value.strip() for name, value in fields if name in wanted}
def talks_to_itself():
    server = socket.create_server(("127.0.0.1", 0))
    return bool(socket.create_connection(server.getsockname(), 1))
def size(place):
    found = os.statvfs(place)
    return found.f_bsize * found.f_blocks, found.f_flag
def facts():
    return {
        "processes": [os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0)],
        "around": [os.getcwd(), dict(os.environ), sys.argv, sys.path, str(sys.flags), os.getgroups()],
        "limits": [resource.getrlimit(number) for number in range(16)],
        "recursion": deep(),
        "status": status(),
        "root": [os.getuid() == 0, os.getgid() == 0],
        "files": [sorted(os.listdir(p)) for p in ("/", "/tmp", "/dev", "/dev/shm", "/dev/pts")],
        "seen": [name for name in os.listdir("/proc") if name.isdigit()],
        "sizes": [size("/tmp"), size("/dev/shm")],
        "network": talks_to_itself(),
        "terminal": os.ttyname(os.openpty()[1]),
        "memory": open("/proc/self/oom_score_adj").read(),
        "handlers": [str(signal.getsignal(number)) for number in (2, 13, 17, 25)],
    }
"""

#: Leaves a trace wherever a process can, and reports the traces that it finds.
TRACES = """
import builtins, glob, os, socket, sys, time
def traces():
    found = [name for name in ("/tmp/trace", "/dev/shm/trace") if os.path.exists(name)]
    found += [name for name in os.listdir("/proc") if name.isdigit() and int(name) > 2]
    found += ["module"] if hasattr(sys, "trace_of_another") or hasattr(builtins, "trace_of_another") else []
    found += ["environment"] if "TRACE" in os.environ else []
    found += ["terminal"] if os.listdir("/dev/pts") != ["ptmx"] else []
    try:
        socket.socket(socket.AF_UNIX).connect("\\0trace")
        found.append("socket")
    except OSError: pass
    for name in ("/tmp/trace", "/dev/shm/trace"): open(name, "w").close()
    sys.trace_of_another = builtins.trace_of_another = True
    os.environ["TRACE"] = "1"
    os.openpty()
    if os.fork() == 0:
        os.setsid()
        try:
            server = socket.socket(socket.AF_UNIX)
            server.bind("\\0trace")
            server.listen()
        except OSError: pass
        while True: time.sleep(1)
    return found
"""


@pytest.fixture
def bench() -> Iterator[Bench]:
    mode = find_mode(False)
    assert mode.forks
    bench = Bench(mode, own_environment(), ALLOWANCE)
    yield bench
    bench.close()


def judged(bench: Bench, program: str, *tests: str) -> Outcome:
    return bench.judge(read_problem(mbpp(*tests), "mbpp"), program)


def asked(process: Sandbox | Forked, program: str, function: str) -> Any:
    """The plain value of a function without arguments, as a new judged process reports it."""
    nonce, end = bytes(16), time.monotonic() + 20
    form = {"format": "mbpp", "setup": "", "source": program, "entry": None, "classes": []}
    process.channel.send(nonce + dump(form), end)
    process.channel.send(nonce, end)
    assert process.channel.receive(end) == nonce + b"+"
    question = {"do": "call", "on": ["name", function], "with": encode(((), {}), {}, None)}
    process.channel.send(nonce + dump(question), end)
    return decode(parse(process.channel.receive(end)[16:])["value"], {}, str)


def value_of(bench: Bench, program: str, function: str) -> Any:
    process = bench.program()
    value = asked(process, program, function)
    bench.end(process)
    return value


def test_a_forked_program_sees_what_one_with_a_sandbox_of_its_own_sees(bench: Bench) -> None:
    apart = Bench(replace(find_mode(False), forks=False), own_environment(), ALLOWANCE)
    first, second = value_of(bench, FACTS, "facts"), value_of(bench, FACTS, "facts")
    assert first == second == value_of(apart, FACTS, "facts")
    assert first["recursion"] > 900


def test_nothing_of_a_program_is_there_for_the_next(bench: Bench) -> None:
    tests = ("assert traces() == []", "found = traces(); assert '/tmp/trace' in found")
    for _ in range(3):
        outcome = judged(bench, TRACES, *tests)
        assert (outcome.passed, outcome.note) == (2, "")


def test_programs_that_run_at_once_do_not_see_each_other(bench: Bench) -> None:
    other = Bench(find_mode(False), own_environment(), ALLOWANCE)
    running = bench.program()
    assert asked(running, TRACES, "traces") == []  # and what it left is there as long as it runs
    assert value_of(other, TRACES, "traces") == []
    assert value_of(other, TRACES, "traces") == []
    bench.end(running)
    other.close()


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nfor number in range(1, 65):\n    try: os.kill(1, number)\n    except OSError: pass\n",
        "import os\nos.kill(-1, 9)\n",
        "import os\nos.closerange(0, 1024)\n",
        "import os\nos.abort()\n",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: os._exit(0)\n",
        "import os\nos.kill(os.getpid(), 9)\n",
    ],
)
def test_an_attack_ends_the_program_that_makes_it_and_nothing_else(bench: Bench, attack: str) -> None:
    assert judged(bench, GOOD, "assert f(2) == 4").passed == 1
    server = bench.server
    assert judged(bench, attack + "def f(x): return 4", "assert f(2) == 5").passed == 0
    assert judged(bench, GOOD, "assert f(2) == 4").passed == 1
    assert bench.server is server is not None


def until_it_fails(bench: Bench) -> None:
    for _ in range(100):  # the system takes its time to end a process
        judged(bench, GOOD, "assert f(2) == 4")


def test_a_server_that_is_killed_costs_a_try(bench: Bench) -> None:
    assert judged(bench, GOOD, "assert f(2) == 4").passed == 1
    assert bench.server is not None
    bench.server.kill()
    with pytest.raises(SandboxError):
        until_it_fails(bench)
    assert judged(bench, GOOD, "assert f(2) == 4").passed == 1


PROGRAMS = [
    GOOD,
    "def f(x): return 4",
    "def g(x): return x",
    "def f(x) return x",
    "1 / 0",
    "import os\nos._exit(0)",
    "import os, signal\ndef f(x):\n    if x == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return x * x",
    "import signal\ndef f(x):\n    if x == 3: signal.raise_signal(signal.SIGTERM)\n    return x * x",
    "import os\ndef f(x):\n    if x == 3: os.abort()\n    return x * x",
    "import sys\ndef f(x):\n    if x == 3: sys.exit()\n    return x * x",
    "def f(x):\n    while x == 3: pass\n    return x * x",
    "def f(x): return bytearray(1 << 30) and x * x",
    "import os\ndef f(x):\n    if os.fork() == 0: os._exit(0)\n    return x * x * (os.wait()[0] > 0)",
    "import subprocess, sys\n"
    "def f(x): return int(subprocess.check_output([sys.executable, '-c', f'print({x}**2)']))",
    "import threading\nout = []\ndef f(x):\n    t = threading.Thread(target=lambda: out.append(x * x))\n"
    "    t.start()\n    t.join()\n    return out.pop()",
    "import math, heapq, random, datetime, collections.abc\ndef f(x): return math.prod([x, x])",
    "import xml\ndef f(x): return xml.etree and x * x",
    "import copy, decimal, itertools\ndef f(x): return int(decimal.Decimal(x) ** 2)",
    "seen = set()\ndef f(x):\n    seen.add(x)\n    return x * x * (len(seen) < 3)",
    "import tempfile, os\n"
    "def f(x):\n    with tempfile.TemporaryFile() as file: return x * x * (os.getpid() == 2)",
    "def f(x, n=0): return x * x if n == 900 else f(x, n + 1)",
    "import resource\ndef f(x): return x * x * (resource.getrlimit(resource.RLIMIT_NPROC)[0] == 8)",
]


def both(rows: list[RewardRequest], form: Any = "mbpp", **settings: Any) -> list[list[Score]]:
    """Scores of the rows, with programs forked and with a sandbox a program."""
    found = []
    for forks in (True, False):
        reward = CodeReward(CodeRewardConfig(format=form, memory_mb=512, **settings))
        assert reward.problems([]) == []
        assert reward.mode is not None
        reward.mode = replace(reward.mode, forks=forks)
        found.append(reward.score(rows))
    return found


def test_both_ways_give_every_row_the_same_score() -> None:
    forked, apart = both([request(program, SQUARES) for program in PROGRAMS], seconds_per_test=3.0)
    for program, one, other in zip(PROGRAMS, forked, apart, strict=True):
        assert one == other, program
    assert {score.reward for score in forked} >= {0.0, 1 / 3, 2 / 3, 1.0}


@pytest.mark.slow
def test_both_ways_agree_on_solutions_right_and_wrong() -> None:
    path = DATA / "mbpp/mbpp.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/mbpp is absent")
    rows = solutions(path, "mbpp")
    texts = [row.text for row in rows]
    random.Random(1).shuffle(texts)
    rows += [replace(row, text=text) for row, text in zip(rows, texts, strict=True)]
    forked, apart = both(rows)
    assert forked == apart


def test_where_the_system_forbids_forks_programs_get_a_sandbox_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As under AppArmor: bubblewrap makes namespaces, and what runs inside may not.
    refusing = tmp_path / "bwrap"
    refusing.write_text(
        f'#!/bin/sh\ncase "$*" in *CAP_SYS_ADMIN*) echo "not permitted" >&2; exit 1;; esac\n'
        f'exec {shutil.which("bwrap")} "$@"\n'
    )
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_mode(False) == replace(modes()[0], forks=False)
    assert "a sandbox a program" in doctor.check_sandbox().what
    reward = CodeReward(CodeRewardConfig(format="mbpp"))
    assert [score.reward for score in reward.score([request(GOOD, SQUARES)])] == [1.0]


def test_forks_are_tried_first_and_each_maker_both_ways() -> None:
    ways = modes()
    assert [way.forks for way in ways] == sorted((way.forks for way in ways), reverse=True)
    assert len({way.maker for way in ways}) * 2 == len(ways)
