"""Progress of long work."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the number of rows finished since the last call.
Progress = Callable[[int], None]


def no_progress(rows: int) -> None:
    """A `Progress` that shows nothing."""
