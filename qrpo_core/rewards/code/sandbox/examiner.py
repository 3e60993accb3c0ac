"""The examiner: runs the data set's tests, one at a time, and never loads judged code.

The tests call a `Remote`, which sends the arguments away and returns the plain value that the judged process
claims. The conversation with the harness (`runner`) uses standard input and output:

    in   L {"setup", "tests", "names", "entry"}   a row's tests          out  D, or E and why not
    in   I {"names", "load"}                      which modules are absent  out  D {name: why}
    in   T number                                 run one test           out  P, or F and why, or U and why
    in   V reply / X reason                       answer to a question   out  C question
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import json
import sys
from typing import Any, NoReturn

from qrpo_core.rewards.code.sandbox.judged import confine, end_first, read_frame, take_pipes, write_frame
from qrpo_core.rewards.code.sandbox.wire import WireError, decode, dump, encode, parse


class CallFailed(BaseException):
    """A call has no value. Not an Exception: a test's own `except` must not take it for the program's."""


class Unaskable(BaseException):
    """The test passes an argument that cannot be sent: an error of the data, not of the program."""


class Conversation:
    """The examiner's end: one question at a time."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests = requests
        self._replies = replies
        self.classes: dict[str, type] = {}
        self.failure: Any = None  # why the running test cannot pass any more

    def receive(self) -> bytes:
        """Return the next message."""
        return read_frame(self._requests)

    def send(self, message: bytes) -> None:
        """Send a message."""
        write_frame(self._replies, message)

    def ask(self, do: str, target: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the judged process's value, or raise the builtin exception that it reports."""
        try:
            form = encode((args, kwargs), self.classes, _number)
        except WireError as error:
            raise Unaskable(str(error)) from None
        question = {"do": do, "on": target, "with": form}
        self.send(b"C" + dump(question))
        reply = self.receive()
        if reply[:1] != b"V":
            self.fail(reply[1:].decode("utf-8", "replace"))
        try:
            match parse(reply[1:]):
                case {"value": form, **rest} if not rest:
                    return decode(form, self.classes, lambda number: Remote(self, ["kept", number]))
                case {"error": [str(name), str(text)], **rest} if not rest:
                    raised = _raised(getattr(builtins, name, None), text)
                case _:
                    raise WireError("its reply is none")
        except WireError as refused:
            self.fail(f"it gave no plain value: {refused}")
        raise raised

    def fail(self, reason: str) -> NoReturn:
        """Fail the test, even if its code catches the exception."""
        self.failure = self.failure or reason
        raise CallFailed(reason)


class Remote:
    """An object in the judged process. It can be called and passed on; its attributes can be read and set.

    Any other use fails the test: only plain data proves anything.
    """

    __slots__ = ("_conversation", "_target")
    _conversation: Conversation
    _target: list[Any]

    def __init__(self, conversation: Conversation, target: list[Any]) -> None:
        object.__setattr__(self, "_conversation", conversation)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._conversation.ask("call", self._target, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._conversation.ask("get", self._target, (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._conversation.ask("set", self._target, (name, value), {})


def _refuse(self: Remote, *_: object) -> NoReturn:
    self._conversation.fail("it gave an object that is no plain data")


_OPERATORS = "eq ne lt le gt ge bool len iter hash getitem contains repr str add radd float int"
for _operator in _OPERATORS.split():
    setattr(Remote, f"__{_operator}__", _refuse)


def _number(value: object) -> int:
    if isinstance(value, Remote) and value._target[0] == "kept":
        return int(value._target[1])
    raise WireError(f"a value of type {type(value).__name__!r} cannot be sent to the judged program")


def _raised(kind: object, text: str) -> Exception:
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise WireError("an error that is none")
    if issubclass(kind, StopIteration | StopAsyncIteration):
        # Inside map() or all() it would end the test's own loop early, before what it has to check.
        return RuntimeError(f"the program raised {kind.__name__}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like want more than a text
        return ValueError(text)


class _Row:
    """The tests of one row."""

    def __init__(self, conversation: Conversation, form: dict[str, Any]) -> None:
        self._conversation = conversation
        self._tests: list[str] = form["tests"]
        self._globals: dict[str, Any] = {"__name__": "examiner", "__builtins__": builtins}
        exec(compile(form["setup"], "<setup>", "exec", dont_inherit=True), self._globals)
        conversation.classes = {
            name: self._globals[name] for name in form["classes"] if isinstance(self._globals.get(name), type)
        }
        for name in form["names"]:
            self._globals[name] = Remote(conversation, ["name", name])
        if form["entry"] is not None:
            self._globals["candidate"] = Remote(conversation, ["candidate", 0])

    def run(self, number: int) -> bytes:
        conversation = self._conversation
        conversation.failure = None
        if "random" in sys.modules:
            sys.modules["random"].seed(0)  # a test that draws numbers asks every program the same
        try:
            test = compile(self._tests[number], "<test>", "exec", dont_inherit=True)
            exec(test, dict(self._globals))
        except Unaskable as error:
            return b"U" + str(error).encode("utf-8", "replace")
        except BaseException as error:
            return _failed(conversation.failure or _described(error))
        # The test may have caught the exception of the failure.
        return _failed(conversation.failure) if conversation.failure is not None else b"P"


def _absent(names: list[str], load: bool) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            if load:
                importlib.import_module(name)
            elif importlib.util.find_spec(name) is None:
                found[name] = "it is not there"
        except BaseException as error:
            found[name] = _described(error)
    return found


def _failed(reason: str) -> bytes:
    return b"F" + reason.encode("utf-8", "replace")


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:
        return type(error).__name__


def main() -> None:
    """Serve rows until the conversation ends. The first argument is the limits, as JSON."""
    conversation = Conversation(*take_pipes())
    end_first()
    confine(json.loads(sys.argv[1]))
    conversation.send(b"ready")
    row: _Row | None = None
    while True:
        message = conversation.receive()
        if message[:1] == b"L":
            try:
                row = _Row(conversation, json.loads(message[1:]))
            except BaseException as error:
                row = None
                conversation.send(b"E" + _described(error).encode("utf-8", "replace"))
            else:
                conversation.send(b"D")
        elif message[:1] == b"I":
            conversation.send(b"D" + json.dumps(_absent(**json.loads(message[1:]))).encode("ascii"))
        elif message[:1] == b"T" and row is not None:
            conversation.send(row.run(int(message[1:])))
