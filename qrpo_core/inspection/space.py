"""What a run adds to the store, beside what is free there: a comparison of many policies fills a disk."""

from __future__ import annotations

from qrpo_core.common.formatting import size


def policy_bytes(parameters: int, dtype: str) -> float:
    """Bytes of a saved policy of so many parameters; dtype is float32 or one of two bytes."""
    return (4.0 if dtype == "float32" else 2.0) * parameters


def space_line(added: float, free: int | None) -> str:
    """A sentence on the bytes that a run adds, and whether they are free.

    free : `Objects.free_bytes` of the store.
    """
    about = f"The store grows by about {size(round(added))}"
    if free is None:
        return f"{about}."
    if added <= free:
        return f"{about}; {size(free)} are free."
    return (
        f"{about}, but only {size(free)} are free: the run would stop at a full disk, losing nothing. "
        "Make room first (`qrpo gc`)."
    )
