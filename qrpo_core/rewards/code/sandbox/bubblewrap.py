"""Run processes with untrusted code under bubblewrap.

A sandbox has no network, no view of other processes, no capabilities and an empty environment. It sees /usr
and Python read-only, only the project files that run there, no home directory, and a /tmp of limited size.
Limits on processor time, address space, file size, open files and processes hold for each process inside. All
of them end with the sandbox, and the sandbox ends with the thread that started it.

bubblewrap cannot limit the number of processes, and the system's limit does not bind root. So a sandbox
started by root switches to a separate user id, for which the limit counts. A sandbox started by an ordinary
user has a user namespace, in which the limit counts too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrpo_core.rewards.code.environment import Environment
from qrpo_core.rewards.code.sandbox.channel import Channel, Ended, Late
from qrpo_core.rewards.code.sandbox.judged import NOBODY
from qrpo_core.rewards.code.sandbox.seccomp import seccomp_filter
from qrpo_core.rewards.code.sandbox.wire import MESSAGE_BYTES

#: What runs in a sandbox: the module of this folder with that name.
Role = Literal["judged", "examiner", "fork_server"]

#: Longest start, on a busy machine.
START_SECONDS = 60.0
#: Most tasks (processes and threads) inside. Memory is limited for each one, so there are few.
PROCESSES = 8
#: Size of /tmp, of /dev/shm and of any file.
FILE_BYTES = 16 << 20

# A fixed hash seed gives sets of strings one order in every process, so that scores do not vary.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[3]
_INSIDE = Path("/qrpo")
#: The packages are apart from our files, so that a program can import the packages alone.
_PACKAGES = Path("/packages")


class SandboxError(Exception):
    """The harness failed, not the code that it runs."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How programs are kept apart.

    maker : who makes a sandbox: root, with a separate user id; any user, with a user namespace; or nobody.
    forks : programs are forked from a fork server; else each has a sandbox and an interpreter of its own.
    """

    maker: Literal["root", "user", "nobody"]
    forks: bool

    def __str__(self) -> str:
        programs = (
            "programs forked" if self.forks else "a sandbox a program, which takes about 5 times as long"
        )
        return f"started as {self.maker}, {programs}"


#: Programs without a sandbox. They could reach a fork server, so there is none.
UNSAFE = Mode("nobody", forks=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of each process in a sandbox.

    cpu_seconds : processor time.
    memory_bytes : address space.
    """

    cpu_seconds: int
    memory_bytes: int


class Sandbox:
    """A process in a sandbox and the channel to it. `close` ends it.

    environment : its interpreter and packages.
    requests : its standard input, a socket; by default a pipe, which is part of the channel.

    It starts at once; `wait` returns when it is up. Raises SandboxError if it cannot start.
    """

    def __init__(
        self,
        role: Role,
        mode: Mode,
        limits: Limits,
        environment: Environment,
        requests: socket.socket | None = None,
    ) -> None:
        self.mode = mode
        self._closed = False
        self._up = False
        self._killed = False
        self._scratch = tempfile.TemporaryDirectory(prefix="qrpo-code-") if mode == UNSAFE else None
        filter_fd = _readable(seccomp_filter())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the sandbox)
        try:
            self._process = subprocess.Popen(
                _command(role, mode, limits, environment, filter_fd),
                stdin=subprocess.PIPE if requests is None else requests.fileno(),
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=self._scratch.name if self._scratch else "/",
                env=_ENVIRONMENT,
                pass_fds=() if role == "fork_server" else (filter_fd,),
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise SandboxError(f"cannot start: {error}") from error
        finally:
            os.close(filter_fd)
        self.channel = _channel(self._process)

    def close(self) -> None:
        """End every process in the sandbox."""
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
        """End every process in the sandbox. A thread that waits for it gets `Ended`.

        If the sandbox is still starting, `wait` ends it: bubblewrap ties its child to itself late, and would
        leave the child behind if killed before that.
        """
        self._killed = True
        if self._up:
            self._end()

    def _end(self) -> None:
        if self.mode == UNSAFE and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def wait(self) -> None:
        """Return when it is up. Raises SandboxError, with bubblewrap's message, if it does not start."""
        # This message can be trusted: no judged code is loaded yet.
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
    assert process.stdout is not None
    replies = os.dup(process.stdout.fileno())
    process.stdout.close()
    if process.stdin is None:
        return Channel(os.open(os.devnull, os.O_WRONLY), replies, MESSAGE_BYTES + 64)
    requests = os.dup(process.stdin.fileno())
    process.stdin.close()
    return Channel(requests, replies, MESSAGE_BYTES + 64)


def _readable(data: bytes) -> int:
    """Return a descriptor that gives these bytes and then ends."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def _command(role: Role, mode: Mode, limits: Limits, environment: Environment, filter_fd: int) -> list[str]:
    settings: dict[str, int | str] = {
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": FILE_BYTES,
        "open_files": 64,
    }
    if role == "fork_server":  # programs get the filter and their user id after the fork
        settings["filter"] = seccomp_filter().hex()
    elif mode.maker == "root":
        settings["uid"] = own_uid()
    if mode != UNSAFE:  # without a sandbox the system would count all the processes of the user
        settings["processes"] = PROCESSES
    home = _INSIDE if mode != UNSAFE else _ROOT
    parents = [_PACKAGES] if mode != UNSAFE else [place.parent for place in environment.packages]
    folders = [str(place) for place in dict.fromkeys(parents)] if environment.packages else []
    start = (
        f"import sys; sys.path[:0] = [{str(home)!r}]; from qrpo_core.rewards.code.sandbox.{role} "
        "import main; "
        f"del sys.path[0]; sys.path[:0] = {folders!r}; main()"
    )
    # -S: no site-packages; -s -P: no folder of a user's; the environment is empty, and has the hash seed.
    python = [str(environment.executable), "-S", "-s", "-P", "-B", "-c", start, json.dumps(settings)]
    if mode == UNSAFE:
        return python
    return [
        shutil.which("bwrap") or "bwrap",
        *_rights(role, mode, filter_fd),
        *_files(role, environment),
        "--",
        *python,
    ]


def _rights(role: Role, mode: Mode, filter_fd: int) -> list[str]:
    options = ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    options += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    for name, value in _ENVIRONMENT.items():
        options += ["--setenv", name, value]
    if mode.maker == "root":
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up by `confine`
    else:
        inside = "0" if role == "fork_server" else str(NOBODY)
        options += ["--unshare-user", "--uid", inside, "--gid", inside]
        options += ["--cap-add", "CAP_SETFCAP"] if role == "fork_server" else []  # to map its user 0
    if role == "fork_server":  # it makes namespaces and mounts; programs can do neither
        return [*options, "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_NET_ADMIN"]
    return [*options, "--seccomp", str(filter_fd)]


def _files(role: Role, environment: Environment) -> list[str]:
    options = ["--ro-bind", "/usr", "/usr"]
    for folder in ("bin", "lib", "lib32", "lib64", "libx32"):
        place = Path("/", folder)
        if place.is_symlink():
            options += ["--symlink", str(place.readlink()), str(place)]
        elif place.is_dir():
            options += ["--ro-bind", str(place), str(place)]
    prefix = environment.prefix
    if not prefix.is_relative_to("/usr"):
        options += [*_parents(prefix), "--ro-bind", str(prefix), str(prefix)]
    options += _parents(_INSIDE / _FOLDER.relative_to(_ROOT) / "__pycache__" / "file")
    for name in dict.fromkeys(["wire", "judged", role]):
        inside = _INSIDE / _FOLDER.relative_to(_ROOT) / f"{name}.py"
        compiled = _FOLDER / "__pycache__" / f"{name}.{environment.tag}.pyc"
        options += ["--ro-bind", str(_FOLDER / inside.name), str(inside)]
        options += ["--ro-bind-try", str(compiled), str(inside.parent / "__pycache__" / compiled.name)]
    if environment.packages:
        options += _parents(_PACKAGES / "name")
    for place in environment.packages:
        options += ["--ro-bind", str(place), str(_PACKAGES / place.name)]
    options += ["--proc", "/proc", "--dev", "/dev"]
    if role == "fork_server":  # it can write nowhere; each program gets its own
        options += ["--dir", "/tmp"]
    else:
        for folder in ("/tmp", "/dev/shm"):
            options += ["--perms", "1777", "--size", str(FILE_BYTES), "--tmpfs", folder]
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _parents(place: Path) -> list[str]:
    """Return options that make the folders above a place readable: by default only bubblewrap's user can."""
    above = [folder for folder in reversed(place.parents) if folder != Path("/")]
    return [word for folder in above for word in ("--perms", "0755", "--dir", str(folder))]


def own_uid() -> int:
    """Return an unused user id: the limit on processes counts per id, so each program needs another one."""
    first, count = _mapped_ids()
    return first + count // 2 + random.SystemRandom().randrange(count // 4)


def _mapped_ids() -> tuple[int, int]:
    """Return (first, count) of the largest range of user ids that this process has."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(int(part) for part in line.split()) for line in file]
    first, _, count = max(ranges, key=lambda mapped: mapped[2])
    return first, min(count, (1 << 31) - first)


def modes() -> list[Mode]:
    """Return the modes that could work here, the better one first.

    Some systems allow bubblewrap to make namespaces and forbid it to what runs inside: no forks there.
    """
    makers: list[Literal["root", "user"]] = ["user"]
    if os.geteuid() == 0 and _mapped_ids()[1] >= 1 << 15:
        makers.insert(0, "root")
    return [Mode(maker, forks) for forks in (True, False) for maker in makers]
