"""Processes for code that nobody vouches for, under bubblewrap.

Inside: no network, no other process, no capability, no environment, a read-only /usr and Python (nothing of
this project but the files that run there, nothing of anybody's home), a /tmp of its own with a size. Limits
on processor time, address space, file size, open files and processes hold for every process inside. All of
them end with the sandbox, and the sandbox ends with the thread that started it.

bubblewrap has no limit on processes, and the system's does not bind root. So a sandbox that root starts
has no user namespace: it gives up to a user id of its own instead, where the limit counts. One that an
ordinary user starts has a user namespace, in which the limit counts too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrpo_core.rewards.code_environment import Environment
from qrpo_core.rewards.sandbox_channel import Channel, Ended, Late
from qrpo_core.rewards.sandbox_seccomp import seccomp_filter
from qrpo_core.rewards.sandbox_wire import MESSAGE_BYTES

#: How a sandbox is made: by root with a user id of its own, by a user with a user namespace, or none.
Mode = Literal["root", "user", "unsafe"]

#: What starting may take on a machine that is busy with other things.
START_SECONDS = 60.0
#: Tasks (processes and threads) inside. Memory is limited for each, so few.
PROCESSES = 8
#: Size of /tmp and of /dev/shm inside, and of any file.
FILE_BYTES = 16 << 20

# Hash seed: sets of strings have one order in every process, so a score does not depend on the draw.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_FOLDER = Path(__file__).parent
_FILES = ("sandbox_wire.py", "sandbox_judged.py", "sandbox_examiner.py")
_INSIDE = Path("/qrpo")
#: Apart from our files: what a program can import is the packages alone.
_PACKAGES = Path("/packages")


class SandboxError(Exception):
    """The harness failed, not the code in it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What every process in a sandbox may use.

    cpu_seconds : processor time.
    memory_bytes : address space.
    """

    cpu_seconds: int
    memory_bytes: int


class Sandbox:
    """A running process of ours in a sandbox and the channel to it. It ends with `close`.

    role : "judged" or "examiner", which of `sandbox_judged` and `sandbox_examiner` runs.
    environment : the interpreter, and the packages that can be imported beside its standard library.
    It starts at once; `wait` until it is up. Raises SandboxError if it cannot be started.
    """

    def __init__(
        self,
        role: Literal["judged", "examiner"],
        mode: Mode,
        limits: Limits,
        environment: Environment,
    ) -> None:
        self._mode = mode
        self._closed = False
        self._up = False
        self._killed = False
        self._scratch = tempfile.TemporaryDirectory(prefix="qrpo-code-") if mode == "unsafe" else None
        filter_fd = _readable(seccomp_filter())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the sandbox)
        try:
            self._process = subprocess.Popen(
                _command(role, mode, limits, environment, filter_fd),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=self._scratch.name if self._scratch else "/",
                env=_ENVIRONMENT,
                pass_fds=(filter_fd,),
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise SandboxError(f"cannot start: {error}") from error
        finally:
            os.close(filter_fd)
        self.channel = _channel(self._process)

    def close(self) -> None:
        """End every process in it."""
        if self._closed:
            return
        self._closed = True
        self._end()
        self._process.wait()
        self.channel.close()
        self._errors.close()
        if self._scratch:
            self._scratch.cleanup()

    def kill(self) -> None:
        """End every process in it; another thread may be waiting for it, and sees `Ended`.

        One that is still starting is left to `wait`, which then raises: bubblewrap ties its child to itself
        late, and killed before that it would leave the child behind.
        """
        self._killed = True
        if self._up:
            self._end()

    def _end(self) -> None:
        if self._mode == "unsafe" and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def wait(self) -> None:
        """Return when it is up. Raises SandboxError, with what bubblewrap says, if it does not come up."""
        # Sent before any judged code is there: this message is true.
        try:
            hello = self.channel.receive(time.monotonic() + START_SECONDS)
        except Late:
            raise SandboxError(f"the sandbox did not start in {START_SECONDS:.0f} s") from None
        except Ended:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read(2000).decode("utf-8", "replace").strip()
            raise SandboxError(f"the sandbox ended with status {code}: {said}") from None
        self._up = True
        if hello != b"ready" or self._killed:
            raise SandboxError(f"the sandbox was ended, or said {hello[:40]!r}")


def _channel(process: subprocess.Popen[bytes]) -> Channel:
    assert process.stdin is not None
    assert process.stdout is not None
    requests, replies = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
    process.stdin.close()
    process.stdout.close()
    return Channel(requests, replies, MESSAGE_BYTES + 64)


def _readable(data: bytes) -> int:
    """A descriptor that gives a few bytes and then ends."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def _command(role: str, mode: Mode, limits: Limits, environment: Environment, filter_fd: int) -> list[str]:
    settings = {
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": FILE_BYTES,
        "open_files": 64,
    }
    if mode == "root":
        settings["uid"] = _own_uid()
    if mode != "unsafe":  # without a sandbox the system would count all the processes of the user
        settings["processes"] = PROCESSES
    home = _INSIDE if mode != "unsafe" else _FOLDER.parent.parent
    parents = [_PACKAGES] if mode != "unsafe" else [place.parent for place in environment.packages]
    folders = [str(place) for place in dict.fromkeys(parents)] if environment.packages else []
    start = (
        f"import sys; sys.path[:0] = [{str(home)!r}]; from qrpo_core.rewards.sandbox_{role} import main; "
        f"del sys.path[0]; sys.path[:0] = {folders!r}; main()"
    )
    # -S: no site-packages; -s -P: no folder of a user's; the environment is empty, and has the hash seed.
    python = [str(environment.executable), "-S", "-s", "-P", "-B", "-c", start, json.dumps(settings)]
    return python if mode == "unsafe" else [*_bubblewrap(mode, environment, filter_fd), *python]


def _bubblewrap(mode: Mode, environment: Environment, filter_fd: int) -> list[str]:
    size = str(FILE_BYTES)
    command = [
        shutil.which("bwrap") or "bwrap",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--cap-drop",
        "ALL",
    ]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    if mode == "root":
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up by `confine`
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--ro-bind", "/usr", "/usr"]
    for folder in ("bin", "lib", "lib32", "lib64", "libx32"):
        place = Path("/", folder)
        if place.is_symlink():
            command += ["--symlink", str(place.readlink()), str(place)]
        elif place.is_dir():
            command += ["--ro-bind", str(place), str(place)]
    prefix = environment.prefix
    if not prefix.is_relative_to("/usr"):
        command += [*_parents(prefix), "--ro-bind", str(prefix), str(prefix)]
    command += _parents(_INSIDE / "qrpo_core" / "rewards" / "__pycache__" / "file")
    for name in _FILES:
        inside = _INSIDE / "qrpo_core" / "rewards" / name
        compiled = _FOLDER / "__pycache__" / f"{name.removesuffix('.py')}.{environment.tag}.pyc"
        command += ["--ro-bind", str(_FOLDER / name), str(inside)]
        command += ["--ro-bind-try", str(compiled), str(inside.parent / "__pycache__" / compiled.name)]
    if environment.packages:
        command += _parents(_PACKAGES / "name")
    for place in environment.packages:
        command += ["--ro-bind", str(place), str(_PACKAGES / place.name)]
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp"]
    command += ["--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
    return [
        *command,
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        "--seccomp",
        str(filter_fd),
        "--",
    ]


def _parents(place: Path) -> list[str]:
    """Make the folders above a place, readable: bubblewrap would make them for its own user alone."""
    above = [folder for folder in reversed(place.parents) if folder != Path("/")]
    return [word for folder in above for word in ("--perms", "0755", "--dir", str(folder))]


def _own_uid() -> int:
    """A user id that nobody has: the limit on processes counts per id, so each sandbox needs its own."""
    first, count = _mapped_ids()
    return first + count // 2 + random.SystemRandom().randrange(count // 4)


def _mapped_ids() -> tuple[int, int]:
    """(first, how many) of the largest range of user ids that exist for this process."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(int(part) for part in line.split()) for line in file]
    first, _, count = max(ranges, key=lambda mapped: mapped[2])
    return first, min(count, (1 << 31) - first)


def modes() -> list[Mode]:
    """The modes that could work here, the better one first."""
    if os.geteuid() == 0 and _mapped_ids()[1] >= 1 << 15:
        return ["root", "user"]
    return ["user"]
