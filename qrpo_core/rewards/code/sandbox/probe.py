"""Find out whether a sandbox works on this machine, with a program that tries to get out."""

from __future__ import annotations

import os
import shutil
import threading
from functools import lru_cache

from qrpo_core.common.errors import ConfigError
from qrpo_core.rewards.code.environment import Environment, own_environment
from qrpo_core.rewards.code.formats import Problem
from qrpo_core.rewards.code.runner import Allowance, Bench
from qrpo_core.rewards.code.sandbox.bubblewrap import PROCESSES, UNSAFE, Mode, SandboxError, modes

_ALLOWANCE = Allowance(seconds_per_test=20.0, seconds_per_program=60.0, memory_bytes=512 << 20)
_lock = threading.Lock()

_PROGRAM = f"""
import os, signal, socket, resource

def forks():
    children = []
    try:
        while len(children) < {4 * PROCESSES}:
            child = os.fork()
            if not child:
                signal.pause()
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)

def writes(place):
    try:
        open(place, "w").close()
    except OSError:
        return False
    return True

def interfaces():
    return [name for _, name in socket.if_nameindex()]

def environment():
    return sorted(os.environ)

def capabilities():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["CapEff"], 16), int(fields["NoNewPrivs"])

def namespace():
    import ctypes
    return ctypes.CDLL(None).unshare(0x10000000) == 0

def fresh():
    return os.listdir("/tmp") == [] and os.getpid() == 2

def seen():
    return sum(name.isdigit() for name in os.listdir("/proc"))
"""

#: The properties of a sandbox, as tests of `_PROGRAM`. The comment names the property.
_KNOWN = {"LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED"}
_TESTS = (
    "assert fresh()  # nothing of another program",
    f"assert forks() < {PROCESSES}  # the limit on processes",
    "assert not writes('/usr/qrpo') and not writes('/qrpo') and not writes('/dev/qrpo')  # read-only",
    "assert writes('/tmp/qrpo')  # a temporary directory",
    "assert interfaces() == ['lo']  # no network",
    f"assert set(environment()) <= {_KNOWN}  # an empty environment",
    "assert capabilities() == (0, 1)  # no privileges",
    "assert not namespace()  # no namespaces of its own",
    "assert seen() <= 3  # other processes hidden",
)


def find_mode(unsafe: bool, environment: Environment | None = None) -> Mode:
    """Return how sandboxes are made here. It is tried once a process.

    unsafe : return UNSAFE if no sandbox works, instead of raising ConfigError.
    environment : of the programs; by default `own_environment`.
    """
    with _lock:
        mode, why = _found(os.environ.get("PATH", ""), environment or own_environment())
    if mode is not None:
        return mode
    if unsafe:
        return UNSAFE
    raise ConfigError(
        f"no sandbox to run programs in: {why}",
        where="reward.code",
        remedy="install bubblewrap (Debian, Ubuntu: apt install bubblewrap) and allow it to make namespaces, "
        "or, where programs may read and do whatever you can, set reward.code.unsafe: true",
    )


@lru_cache
def _found(path: str, environment: Environment) -> tuple[Mode | None, str]:
    # The path is the cache key, so that a change of PATH is noticed.
    if shutil.which("bwrap", path=path) is None:
        return None, "bwrap is not on the path"
    reasons = []
    for mode in modes():
        reason = try_mode(mode, environment)
        if reason is None:
            return mode, ""
        reasons.append(f"{mode}: {reason}")
    return None, "; ".join(reasons)


def try_mode(mode: Mode, environment: Environment) -> str | None:
    """Return None if a sandbox of this mode holds, else the reason. Takes about 0.2 s."""
    problem = Problem("mbpp", _TESTS, "", "", None, _names(), ())
    bench = Bench(mode, environment, _ALLOWANCE)
    try:
        outcome = bench.judge(problem, _PROGRAM)
        if outcome.passed == outcome.total:  # the next program finds nothing of the first
            outcome = bench.judge(problem, _PROGRAM)
    except (SandboxError, OSError) as error:
        return str(error)
    finally:
        bench.close()
    if outcome.passed == outcome.total:
        return None
    return f"{outcome.total - outcome.passed} of {outcome.total} properties do not hold ({outcome.note})"


def _names() -> tuple[str, ...]:
    return ("forks", "writes", "interfaces", "environment", "capabilities", "namespace", "seen", "fresh")
