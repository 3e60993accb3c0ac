"""The fork server: an interpreter in a sandbox that forks a process for each program.

It is told to fork and nothing else: no program, no test and no question ever reaches it. A program's process
is forked into namespaces of its own (processes, mounts, network, System V memory, host name), with its own
/tmp, /dev/shm, /dev/pts and /proc, and gives up every privilege before its program comes. Its pipes come from
the harness over the control socket, which it closes first. See docs/adr/0013-the-fork-server.md.

    in   a user id (0: the process makes a user namespace), with two descriptors: the program's pipes
    out  a descriptor of the process that ends the program's namespaces, and the program, when it ends
"""

from __future__ import annotations

# Some of these are here only so that programs find them loaded: modules without submodules, because
# `import x` must not make `x.y` appear. What the server itself needs is small, because each fork copies it.
import _socket
import bisect  # noqa: F401
import contextlib
import ctypes
import datetime  # noqa: F401
import fcntl
import gc
import heapq  # noqa: F401
import json
import math  # noqa: F401
import os
import random  # noqa: F401
import signal
import string  # noqa: F401
import struct
import sys
from typing import Any, NoReturn

from qrpo_core.rewards.code.sandbox.judged import (
    NOBODY,
    confine,
    converse,
    take_pipes,
    write_frame,
)

_NEW_MOUNTS, _NEW_HOST_NAME, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8
_RECURSIVE, _PRIVATE = 1 << 14, 1 << 18
_SET_SECCOMP, _FILTER, _SET_DUMPABLE = 22, 2, 4
_CAPABILITIES = struct.pack("=Ii", 0x20080522, 0)  # struct __user_cap_header_struct, version 3
_SET_FLAGS, _UP = 0x8914, 0x1 | 0x40  # SIOCSIFFLAGS; IFF_UP, IFF_RUNNING

_libc = ctypes.CDLL(None, use_errno=True)
_capset, _mount, _prctl, _setns, _unshare = (
    getattr(_libc, name) for name in ("capset", "mount", "prctl", "setns", "unshare")
)


class _Filter(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def main() -> None:
    """Fork until the harness closes the control socket. The first argument is the limits, as JSON."""
    control_fd, replies = take_pipes()
    control = _socket.socket(fileno=control_fd)
    settings = json.loads(sys.argv[1])
    sys.argv[1:] = []
    _call(_mount, None, b"/", None, _RECURSIVE | _PRIVATE, None)
    gc.collect()
    gc.freeze()
    write_frame(replies, b"ready")
    os.close(replies)
    # Returns in a program's process only. The program runs as deep in the stack as without a fork server.
    converse(*_serve(control, settings))


def _serve(control: _socket.socket, settings: dict[str, Any]) -> tuple[int, int]:
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    while True:
        message, rights, _, _ = control.recvmsg(64, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        requests, replies = struct.unpack("2i", rights[0][2])
        _reap()
        _call(_unshare, _NEW_PROCESSES)  # of the next child, not of this process
        pid = os.fork()
        if not pid:
            control.close()
            os.close(own)
            return _start(int(message), requests, replies, settings)
        _call(_setns, own, _NEW_PROCESSES)
        os.close(requests)
        os.close(replies)
        handle = os.pidfd_open(pid)
        control.sendmsg([b"+"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", handle))])
        os.close(handle)


def _start(uid: int, requests: int, replies: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Return the pipes in the program's process. The calling process is the first of its namespaces."""
    os.setsid()
    program = os.fork()
    if program:
        _wait_for(program, requests, replies)
    try:
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)  # of the server: the program's is read-only
        _write(proc, "oom_score_adj", b"1000")  # if the machine runs out of memory, this process goes first
        _isolate(settings["file_bytes"])
        os.chdir("/tmp")
        if not uid:
            _become_nobody(proc)
        os.close(proc)
        confine(settings | ({"uid": uid} if uid else {}))
        _call(_capset, _CAPABILITIES, bytes(24))
        steps = bytes.fromhex(settings["filter"])
        _call(_prctl, _SET_SECCOMP, _FILTER, ctypes.byref(_Filter(len(steps) // 8, steps)), 0, 0)
    except BaseException as error:
        write_frame(replies, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        os._exit(1)
    return requests, replies


def _wait_for(program: int, requests: int, replies: int) -> NoReturn:
    """Take in the children that end until the program has; what is left of it ends with this process."""
    try:
        os.close(requests)
        os.close(replies)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system ignores it if the program sends it
        _call(_prctl, _SET_DUMPABLE, 0, 0, 0, 0)
        _call(_capset, _CAPABILITIES, bytes(24))
        while os.wait()[0] != program:
            pass
    finally:
        os._exit(0)


def _isolate(file_bytes: int) -> None:
    """Make the namespaces of a program, with what is mounted and up in them."""
    _call(_unshare, _NEW_MOUNTS | _NEW_HOST_NAME | _NEW_IPC | _NEW_NETWORK)
    harmless = _NO_SUID | _NO_EXEC
    size = b"mode=1777,size=%d" % file_bytes
    _call(_mount, b"tmpfs", b"/tmp", b"tmpfs", _NO_SUID | _NO_DEVICES, size)
    _call(_mount, b"tmpfs", b"/dev/shm", b"tmpfs", _NO_SUID | _NO_DEVICES, size)
    _call(_mount, b"devpts", b"/dev/pts", b"devpts", harmless, b"newinstance,ptmxmode=0666,mode=620")
    _call(_mount, b"proc", b"/proc", b"proc", harmless | _NO_DEVICES | _READ_ONLY, None)
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket.fileno(), _SET_FLAGS, struct.pack("16sh22x", b"lo", _UP))
    any_socket.close()


def _become_nobody(proc: int) -> None:
    """Enter a user namespace without privileges outside; proc : a writable /proc."""
    user, group = os.geteuid(), os.getegid()
    _call(_unshare, _NEW_USER)
    _write(proc, "setgroups", b"deny")
    _write(proc, "uid_map", b"%d %d 1" % (NOBODY, user))
    _write(proc, "gid_map", b"%d %d 1" % (NOBODY, group))


def _write(proc: int, name: str, text: bytes) -> None:
    file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
    os.write(file, text)
    os.close(file)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")
