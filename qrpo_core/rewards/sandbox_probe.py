"""Whether a sandbox works on this machine: it is tried, with a program that tries to get out."""

from __future__ import annotations

import os
import shutil
import threading
from functools import lru_cache

from qrpo_core.errors import ConfigError
from qrpo_core.rewards.code_environment import own_environment
from qrpo_core.rewards.code_formats import Problem
from qrpo_core.rewards.code_run import Allowance, Bench
from qrpo_core.rewards.sandbox import PROCESSES, Mode, SandboxError, modes

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

def seen():
    return sum(name.isdigit() for name in os.listdir("/proc"))
"""

#: What has to hold inside, as tests of `_PROGRAM`; the text after # is what does not hold otherwise.
_KNOWN = {"LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED"}
_TESTS = (
    f"assert forks() < {PROCESSES}  # the limit on processes",
    "assert not writes('/usr/qrpo') and not writes('/qrpo') and not writes('/dev/qrpo')  # read-only",
    "assert writes('/tmp/qrpo')  # a temporary directory",
    "assert interfaces() == ['lo']  # no network",
    f"assert set(environment()) <= {_KNOWN}  # an empty environment",
    "assert capabilities() == (0, 1)  # no privileges",
    "assert not namespace()  # no namespaces of its own",
    "assert seen() <= 3  # other processes hidden",
)


def find_mode(unsafe: bool) -> Mode:
    """How sandboxes are made here; tried once a process.

    unsafe : go without where none works.
    Raises ConfigError naming bubblewrap and `reward.code.unsafe`.
    """
    with _lock:
        mode, why = _found(os.environ.get("PATH", ""))
    if mode is not None:
        return mode
    if unsafe:
        return "unsafe"
    raise ConfigError(
        f"no sandbox to run programs in: {why}",
        where="reward.code",
        remedy="install bubblewrap (Debian, Ubuntu: apt install bubblewrap) and allow it to make namespaces, "
        "or, where programs may read and do whatever you can, set reward.code.unsafe: true",
    )


@lru_cache
def _found(path: str) -> tuple[Mode | None, str]:
    # Keyed by the path: a program that is installed, or taken away, meanwhile is seen.
    if shutil.which("bwrap", path=path) is None:
        return None, "bwrap is not on the path"
    reasons = []
    for mode in modes():
        reason = try_mode(mode)
        if reason is None:
            return mode, ""
        reasons.append(f"as {mode}: {reason}")
    return None, "; ".join(reasons)


def try_mode(mode: Mode) -> str | None:
    """None if a sandbox made this way holds, otherwise what it lacks. Takes about 0.1 s."""
    problem = Problem("mbpp", _TESTS, "", "", None, _names(), ())
    bench = Bench(mode, own_environment())
    try:
        outcome = bench.judge(problem, _PROGRAM, _ALLOWANCE)
    except (SandboxError, OSError) as error:
        return str(error)
    finally:
        bench.close()
    if outcome.passed == outcome.total:
        return None
    return f"{outcome.total - outcome.passed} of {outcome.total} properties do not hold ({outcome.note})"


def _names() -> tuple[str, ...]:
    return ("forks", "writes", "interfaces", "environment", "capabilities", "namespace", "seen")
