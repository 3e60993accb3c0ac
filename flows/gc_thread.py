"""Python's garbage collection for a Prefect server on SQLite: in a thread of its own.

A cursor that is part of a cycle is closed by whoever collects it, and waits there for its connection, which
a thread may hold for as long as the database is locked (Prefect lets SQLite wait for 60 s). If the one who
waits is the event loop, which has the next step of the transaction that holds the lock, the whole server
stands still until that time is over. A thread that waits keeps nobody.
"""

from __future__ import annotations

import gc
import threading
import time

#: Seconds between collections of what is young; every so many of them, of everything.
_SECONDS, _ALL = 1.0, 60


def collect_in_a_thread() -> None:
    """Switch automatic collection off, and have it done by a thread until the process ends."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    turn = 0
    while True:
        time.sleep(_SECONDS)
        turn = (turn + 1) % _ALL
        gc.collect(1 if turn else 2)
