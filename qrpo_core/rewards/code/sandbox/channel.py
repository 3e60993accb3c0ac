"""Messages over a pipe pair to a process that may never answer, answer too much, or answer too early."""

from __future__ import annotations

import os
import select
import time

from qrpo_core.common.waits import ready


class Ended(Exception):
    """The other end closed the pipe: the process is gone."""


class Late(Exception):
    """The time ended before the message was complete."""


class Broken(Exception):
    """A message breaks the protocol: it is too long, or came without a question."""


class Channel:
    """One end: four bytes of length, then the message. Owns both descriptors and makes them non-blocking.

    requests : descriptor to write to.
    replies : descriptor to read from.
    longest : longest reply in bytes.
    """

    def __init__(self, requests: int, replies: int, longest: int) -> None:
        self._requests = requests
        self._replies = replies
        self._longest = longest
        for descriptor in (requests, replies):
            os.set_blocking(descriptor, False)

    def send(self, message: bytes, deadline: float) -> None:
        """Send a message. Raises Late at `deadline` (time.monotonic) and Ended if nobody reads."""
        view = memoryview(len(message).to_bytes(4, "big") + message)
        while view:
            _in_time(deadline)
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                _wait(self._requests, select.POLLOUT, deadline)
            except BrokenPipeError:
                raise Ended("the process ended") from None

    def receive(self, deadline: float) -> bytes:
        """Return the next message. Raises Late, Ended, or Broken for one that is too long."""
        _wait(self._replies, select.POLLIN, deadline)
        length = int.from_bytes(self._read(4, deadline), "big")
        if length > self._longest:
            raise Broken(f"a reply of more than {self._longest >> 20} MB")
        return self._read(length, deadline)

    def refuse_waiting(self) -> None:
        """Raise Broken if a message waits although nothing was asked."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        for _, event in poll.poll(0):
            if event & select.POLLIN:
                raise Broken("it answered before it was asked")
            raise Ended("the process ended")

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._requests)
        os.close(self._replies)

    def _read(self, count: int, deadline: float) -> bytes:
        parts = []
        while count:
            _in_time(deadline)
            try:
                part = os.read(self._replies, min(count, 1 << 20))
            except BlockingIOError:
                _wait(self._replies, select.POLLIN, deadline)
                continue
            if not part:
                raise Ended("the process ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _in_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise Late("the time is over")


def _wait(descriptor: int, event: int, deadline: float) -> None:
    if not ready(descriptor, event, deadline):
        raise Late("the time is over")
