"""Garbage collection of a Prefect server in a thread, so that its event loop never waits for SQLite.

Python closes a cursor that is part of a reference cycle in the thread that collects the cycle. Closing waits
for the cursor's connection, which another thread may hold while the database is locked (up to 60 s). If the
event loop collected it, the transaction that holds the lock could not go on, and the whole server would stop
for that time. We found no setting of Prefect 3.8 against it.
"""

from __future__ import annotations

import gc
import threading
import time

#: Seconds between collections of young objects, and how many of those pass between full collections.
_SECONDS, _FULL_EVERY = 1.0, 60


def collect_in_thread() -> None:
    """Switch automatic collection off; a daemon thread collects until the process ends."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    turn = 0
    while True:
        time.sleep(_SECONDS)
        turn = (turn + 1) % _FULL_EVERY
        gc.collect(1 if turn else 2)
