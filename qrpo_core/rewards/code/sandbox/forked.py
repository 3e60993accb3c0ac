"""The harness's end of the fork server: programs forked in a sandbox that lives on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time

from qrpo_core.common.waits import ready
from qrpo_core.rewards.code.environment import Environment
from qrpo_core.rewards.code.sandbox.bubblewrap import (
    START_SECONDS,
    Limits,
    Mode,
    Sandbox,
    SandboxError,
    own_uid,
)
from qrpo_core.rewards.code.sandbox.channel import Broken, Channel, Ended, Late
from qrpo_core.rewards.code.sandbox.wire import MESSAGE_BYTES


class Forked:
    """The process of one program and the channel to it. `close` ends its namespaces and all in them.

    handle : descriptor (pidfd) of the first process of its namespaces.
    """

    def __init__(self, handle: int, channel: Channel) -> None:
        self._handle = handle
        self._closed = False
        self.channel = channel

    def close(self) -> None:
        """End the program, without waiting for the system to do so."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> None:
        """Return when a program that was closed has ended. Raises SandboxError if it does not end."""
        # The handle is readable after the last process of the namespaces has ended.
        ended = ready(self._handle, select.POLLIN, time.monotonic() + START_SECONDS)
        os.close(self._handle)
        if not ended:
            raise SandboxError(f"a program did not end in {START_SECONDS:.0f} s")


class ForkServer(Sandbox):
    """A sandbox that forks programs with given limits. It never sees what they are.

    While a program runs, the process of the next one starts and that of the last one ends.
    """

    def __init__(self, mode: Mode, limits: Limits, environment: Environment) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_SECONDS)
        self._next: Channel | None = None
        self._before: list[Forked] = []
        try:
            super().__init__("fork_server", mode, limits, environment, theirs)
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()

    def fork(self) -> Forked:
        """Return a new process, ready for a program. The one before it is closed, if it was not.

        Raises SandboxError if there is none; then the server is of no more use.
        """
        for each in self._before:
            each.close()
        if len(self._before) == 2:
            self._before.pop(0).wait()
        channel, self._next = self._next or self._asked(), None
        forked = self._started(channel)
        self._before.append(forked)
        self._next = self._asked()
        return forked

    def close(self) -> None:
        """End the server and every program."""
        super().close()
        self._control.close()
        if self._next:
            self._next.close()
            self._next = None
        for each in self._before:
            each.close()
            each.wait()
        self._before.clear()

    def _asked(self) -> Channel:
        """Ask for a process and return the channel to it."""
        requests, ours = os.pipe()
        theirs, replies = os.pipe()
        channel = Channel(ours, theirs, MESSAGE_BYTES + 64)
        uid = own_uid() if self.mode.maker == "root" else 0
        try:
            socket.send_fds(self._control, [b"%d" % uid], [requests, replies])
        except OSError as error:
            channel.close()
            raise SandboxError(f"the fork server: {type(error).__name__}: {error}") from None
        finally:
            os.close(requests)
            os.close(replies)
        return channel

    def _started(self, channel: Channel) -> Forked:
        """Return the process at the other end of a channel, when it is up."""
        try:
            _, handles, _, _ = socket.recv_fds(self._control, 64, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            channel.close()
            raise SandboxError(f"the fork server: {type(error).__name__}: {error}") from None
        if not handles:
            channel.close()
            raise SandboxError("the fork server ended")
        forked = Forked(handles[0], channel)
        try:
            # This message can be trusted: no judged code is loaded yet.
            hello = channel.receive(time.monotonic() + START_SECONDS)
            if hello != b"ready":
                raise Broken(hello[:300].decode("utf-8", "replace"))
        except (Late, Ended, Broken) as error:
            forked.close()
            forked.wait()
            raise SandboxError(f"a program's process did not start: {error}") from None
        return forked
