"""Waits that a signal ends, and what they return."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from qrpo_core.common import waits

# The signal goes to another thread, so nothing wakes the main thread: what an unlucky moment also does.
PROGRAM = """
    import os, select, signal, sys, threading, time
    from concurrent.futures import Future
    from queue import SimpleQueue
    from qrpo_core.common import waits

    def interrupt():
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        time.sleep(60)

    other = threading.Thread(target=interrupt, daemon=True)
    other.start()
    {wait}
"""


@pytest.mark.parametrize(
    "wait",
    [
        "next(waits.as_completed([Future()]))",
        "waits.get(SimpleQueue())",
        "waits.join(other)",
        "waits.ready(os.pipe()[0], select.POLLIN, time.monotonic() + 40)",
    ],
)
def test_a_signal_that_another_thread_receives_ends_the_wait(wait: str) -> None:
    program = textwrap.dedent(PROGRAM).format(wait=wait)
    ended = subprocess.run([sys.executable, "-c", program], timeout=50, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGINT, ended.stderr.decode()


def test_every_future_is_yielded_once_even_if_it_takes_longer_than_one_wait() -> None:
    with ThreadPoolExecutor(3) as pool:
        futures = {pool.submit(time.sleep, seconds): seconds for seconds in (1.2, 0.0, 0.1)}
        assert [futures[future] for future in waits.as_completed(futures)] == [0.0, 0.1, 1.2]
    assert list(waits.as_completed([])) == []


def test_items_come_in_order_even_if_they_come_late() -> None:
    queue: SimpleQueue[int] = SimpleQueue()
    queue.put(1)
    threading.Timer(1.2, queue.put, [2]).start()
    assert [waits.get(queue), waits.get(queue)] == [1, 2]


def test_a_thread_has_ended_when_join_returns() -> None:
    thread = threading.Thread(target=time.sleep, args=[1.2])
    thread.start()
    waits.join(thread)
    assert not thread.is_alive()


def test_a_descriptor_is_ready_at_once_late_or_not_in_time() -> None:
    read, write = os.pipe()
    assert not waits.ready(read, select.POLLIN, time.monotonic() - 1)
    assert not waits.ready(read, select.POLLIN, time.monotonic() + 0.05)
    assert waits.ready(write, select.POLLOUT, time.monotonic() + 20)
    threading.Timer(1.2, os.write, [write, b"1"]).start()
    assert waits.ready(read, select.POLLIN, time.monotonic() + 20)
    assert not waits.ready(read, select.POLLIN, time.monotonic() - 1)  # the time is over, whatever waits
    os.close(read)
    os.close(write)
