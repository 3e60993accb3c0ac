"""The judged process: loads one program inside the sandbox and answers calls of it.

Standard input and output are the pipes of the conversation (`channel.py`); the program sees /dev/null
instead. It can find the pipes and write to them, but then it only claims values, which the examiner compares
like any other. Nothing here is trusted once the program is loaded.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
from typing import TYPE_CHECKING, Any

from qrpo_core.rewards.code.sandbox.wire import decode, dump, encode, parse

if TYPE_CHECKING:
    import ast

#: Bytes of the nonce before each message.
NONCE = 16
#: User id of a program in a user namespace.
NOBODY = 65534

_LIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
}


def read_frame(descriptor: int) -> bytes:
    """Return one message: four bytes of length, then its bytes. The process ends with the conversation."""
    parts = []
    missing = 4
    length: int | None = None
    while missing:
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        missing -= len(part)
        if not missing and length is None:
            missing = length = int.from_bytes(b"".join(parts), "big")
            parts = []
    return b"".join(parts)


def write_frame(descriptor: int, data: bytes) -> None:
    """Send one message."""
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(descriptor, view) :]


def take_pipes() -> tuple[int, int]:
    """Return (requests, replies), moved off descriptors 0 and 1. Descriptors 0 to 2 become /dev/null."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    return requests, replies


def end_first() -> None:
    """Let the system end this process before others if the machine runs out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def confine(limits: dict[str, int]) -> None:
    """Set the limits, and become the unprivileged user `uid` if root started the sandbox."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, which in _LIMITS.items():
        if name in limits:
            hard = resource.getrlimit(which)[1]
            limit = limits[name] if hard == resource.RLIM_INFINITY else min(limits[name], hard)
            resource.setrlimit(which, (limit, limit))
    if "uid" in limits:
        os.setgroups([])
        os.setresgid(limits["uid"], limits["uid"], limits["uid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])


def main() -> None:
    """Answer until the conversation ends. The first argument is the limits, as JSON."""
    requests, replies = take_pipes()
    end_first()
    confine(json.loads(sys.argv[1]))
    sys.argv[1:] = []
    converse(requests, replies)


def converse(requests: int, replies: int) -> None:
    """Say that the process is up, load one program and answer until the conversation ends."""
    write_frame(replies, b"ready")
    program = parse(read_frame(requests)[NONCE:])
    judged = _Judged(program)
    first = read_frame(requests)
    write_frame(replies, first[:NONCE] + judged.load())
    while True:
        message = read_frame(requests)
        write_frame(replies, message[:NONCE] + judged.answer(message[NONCE:]))


class _Judged:
    """The program, and those of its values that stay in this process."""

    def __init__(self, program: dict[str, Any]) -> None:
        self._program = program
        self._kept: list[object] = []
        self._candidate: Any = None
        self.namespace: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}

    def load(self) -> bytes:
        """Return b"+" if the program loads, else b"-" and the reason."""
        try:
            for source in self._sources():
                exec(compile(source, "<completion>", "exec", dont_inherit=True), self.namespace)
            if self._program["entry"] is not None:
                self._candidate = eval(self._program["entry"], self.namespace)
        except BaseException as error:
            return b"-" + _described(error).encode("utf-8", "replace")
        return b"+"

    def answer(self, message: bytes) -> bytes:
        """Return the reply to one question: {"value": form} or {"error": [type, text]}."""
        try:
            value = self._do(parse(message))
            reply = {"value": encode(value, self._classes(), self._keep)}
        except Exception as error:
            reply = {"error": [_name(error), _text(error)]}
        return dump(reply)

    def _sources(self) -> list[str]:
        setup, program = self._program["setup"], self._program["source"]
        if self._program["format"] != "humaneval":
            return [setup, program]
        import ast  # takes 8 ms, which the other formats save

        tree = _parsed(program)
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} if tree else set()
        if self._program["entry"] in names:
            return [setup, program]
        # The program is the function's body, indented or not.
        for body in (program, "\n".join("    " + line for line in program.splitlines())):
            if _compiles(setup + "\n" + body):
                return [setup + "\n" + body]
        return [setup, program]

    def _do(self, request: Any) -> Any:
        kind, key = request["on"]
        target: Any
        if kind == "candidate":
            target = self._candidate
        elif kind == "name":
            target = self.namespace[key]
        else:
            target = self._kept[key]
        args, kwargs = decode(request["with"], self._classes(), self._kept.__getitem__)
        if request["do"] == "call":
            return target(*args, **kwargs)
        return (getattr if request["do"] == "get" else setattr)(target, *args)

    def _classes(self) -> dict[str, type]:
        found = {name: self.namespace.get(name) for name in self._program["classes"]}
        return {name: kind for name, kind in found.items() if isinstance(kind, type)}

    def _keep(self, value: object) -> int:
        self._kept.append(value)
        return len(self._kept) - 1


def _parsed(source: str) -> ast.Module | None:
    import ast

    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _compiles(source: str) -> bool:
    try:
        compile(source, "<completion>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _name(error: BaseException) -> str:
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return "(its text cannot be read)"
