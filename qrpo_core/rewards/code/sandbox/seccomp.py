"""The system calls that judged code may not use, as a filter for bubblewrap's --seccomp.

The most important are namespaces: inside one a program could mount file systems without a size, and so use
memory that no limit counts. No limit counts System V memory either. The other calls are parts of the kernel
that no solution to an exercise needs. Numbers: Linux, include/uapi/asm-generic/unistd.h and
arch/x86/entry/syscalls/syscall_64.tbl; format: linux/filter.h and seccomp(2).
"""

from __future__ import annotations

import errno
import platform
import struct

#: machine: (audit architecture, clone, numbers that answer EPERM)
_MACHINES: dict[str, tuple[int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        56,
        {
            "shmget": 29,
            "shmat": 30,
            "shmctl": 31,
            "semget": 64,
            "msgget": 68,
            "ptrace": 101,
            "pivot_root": 155,
            "chroot": 161,
            "mount": 165,
            "umount2": 166,
            "mq_open": 240,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "perf_event_open": 298,
            "name_to_handle_at": 303,
            "open_by_handle_at": 304,
            "setns": 308,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "bpf": 321,
            "userfaultfd": 323,
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        {
            "umount2": 39,
            "mount": 40,
            "pivot_root": 41,
            "chroot": 51,
            "unshare": 97,
            "ptrace": 117,
            "mq_open": 180,
            "msgget": 186,
            "semget": 190,
            "shmget": 194,
            "shmctl": 195,
            "shmat": 196,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "name_to_handle_at": 264,
            "open_by_handle_at": 265,
            "setns": 268,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "bpf": 280,
            "userfaultfd": 282,
        },
    ),
}
# The same number on every machine: io_uring_*, open_tree to fspick, mount_setattr, memfd_secret.
_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 447)
_CLONE3 = 435
_X32 = 0x40000000  # x86-64: numbers of another table from here on
#: CLONE_NEWTIME to CLONE_NEWNET, as clone(2) takes them.
_NEW_NAMESPACES = 0x7E020080

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000


def seccomp_filter() -> bytes:
    """Return the filter of this machine in bubblewrap's form; empty for an unknown machine."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return b""
    architecture, clone, denied = machine
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 0, 1),
        refuse,
    ]
    for number in sorted([*denied.values(), *_EVERYWHERE]):
        steps += [_step(_EQUAL, number, 0, 1), refuse]
    # A filter cannot read the flags of clone3, which are behind a pointer. The C library falls back to clone.
    steps += [_step(_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS)]
    steps += [
        _step(_EQUAL, clone, 0, 3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
    ]
    return b"".join([*steps, refuse, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
