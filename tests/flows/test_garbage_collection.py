"""A server collects garbage in a thread of its own, not in its event loop."""

from __future__ import annotations

import subprocess
import sys

#: Cycles that say who collected them; one is made old first, so that only a whole collection finds it.
PROGRAM = """
import gc, sys, threading, time
from flows.service import garbage_collection

garbage_collection._SECONDS, garbage_collection._FULL_EVERY = 0.05, 5
seen = []

class Knot:
    def __init__(self, name): self.name, self.me = name, self
    def __del__(self): seen.append((self.name, threading.current_thread().name))

old = Knot("old")
gc.collect(), gc.collect()
garbage_collection.collect_in_thread()
del old
for number in range(50_000):  # many more than start a collection by themselves
    Knot(number) if number % 1000 == 0 else []
deadline = time.monotonic() + 120
while len(seen) < 51 and time.monotonic() < deadline:
    time.sleep(0.05)
assert len(seen) == 51, len(seen)
assert {thread for _, thread in seen} == {"garbage"}, seen
"""


def test_cycles_are_collected_by_a_thread_and_nowhere_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
