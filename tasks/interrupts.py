"""Ctrl-C is heard whenever it comes, also while Prefect is busy with its own records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def interrupted(error: BaseException) -> bool:
    """Whether an error comes from an interrupt: is one, or was raised while one was handled."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


@contextmanager
def interrupts() -> Iterator[None]:
    """For a call of a task: an interrupt that Prefect made another error of is raised as what it was.

    One that comes while Prefect creates a task run is handled as the crash of a run that is not there yet,
    and leaves as `ValueError: Task run is not set`: the flow would be Failed, with a traceback.
    """
    try:
        yield
    except Exception as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise
