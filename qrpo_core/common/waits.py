"""Waits that a signal ends.

Python acts on a signal between two instructions of the main thread. If the signal comes just before a wait
without a time limit, or another thread of the process receives it, Python acts on it only when that wait
ends, which may be never. These waits wake once a second.
"""

from __future__ import annotations

import concurrent.futures
import select
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

_SECONDS = 1.0

T = TypeVar("T")


def as_completed(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Yield each future when it is done, as `concurrent.futures.as_completed` does."""
    waiting = set(futures)
    while waiting:
        done, waiting = concurrent.futures.wait(waiting, _SECONDS, concurrent.futures.FIRST_COMPLETED)
        yield from done


def get(queue: SimpleQueue[T]) -> T:
    """Return the next item of a queue."""
    while True:
        try:
            return queue.get(timeout=_SECONDS)
        except Empty:
            continue


def ready(descriptor: int, event: int, deadline: float) -> bool:
    """Return whether a descriptor has an event of `select.poll` before `deadline` (`time.monotonic`)."""
    poll = select.poll()
    poll.register(descriptor, event)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(max(1.0, 1000 * min(left, _SECONDS))):
            return True
    return False


def join(thread: threading.Thread) -> None:
    """Return when a thread has ended."""
    while thread.is_alive():
        thread.join(_SECONDS)
