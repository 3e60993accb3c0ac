"""Work that takes long before a run begins tells on standard error that it goes on."""

from __future__ import annotations

import sys
import time

from qrpo_core.engines.base import Progress

#: Seconds between lines; what takes less says nothing.
_EVERY = 5.0


def told(verb: str, unit: str) -> Progress:
    """Count, and write every few seconds how much it is by now: `qrpo: checked 4,000 prompts`."""
    last, done = 0.0, 0

    def progress(count: int) -> None:
        nonlocal last, done
        if not done:
            last = time.monotonic()
        done += count
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            print(f"qrpo: {verb} {done:,} {unit}", file=sys.stderr)

    return progress
