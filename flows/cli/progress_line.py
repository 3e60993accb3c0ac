"""Progress lines on standard error for work before a run starts, or without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qrpo_core.common.progress import Progress

#: Seconds between lines; work that takes less prints none.
_SECONDS = 5.0


def every_few_seconds() -> Callable[[str], None]:
    """A function that prints a line `qrpo: TEXT`, but not its first, and none too soon after the last.

    What comes before the first, such as loading a tokenizer, is not what the lines count.
    """
    last: float | None = None

    def write(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None:
            last = now
        elif now - last >= _SECONDS:
            last = now
            print(f"qrpo: {text}", file=sys.stderr)

    return write


def progress_line(verb: str, unit: str) -> Progress:
    """A function that adds up counts and prints the sum every few seconds: `qrpo: checked 4,000 prompts`."""
    done, write = 0, every_few_seconds()

    def progress(count: int) -> None:
        nonlocal done
        done += count
        write(f"{verb} {done:,} {unit}")

    return progress
