"""Recognise Ctrl-C where Prefect turns it into another error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is a KeyboardInterrupt, or was raised while one was handled."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


@contextmanager
def reraise_interrupts() -> Iterator[None]:
    """Around the call of a task: raise KeyboardInterrupt where Prefect raises another error in its place.

    If Ctrl-C comes while Prefect creates a task run, Prefect handles it as the crash of a run that does not
    exist yet and raises `ValueError: Task run is not set`: the flow would be Failed, with a traceback.
    """
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        raise
