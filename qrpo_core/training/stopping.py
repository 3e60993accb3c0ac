"""The request that a training saves a checkpoint and ends: a file in its work directory.

The processes of a training, however many, see it. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

_STOP = "stop"


def request_stop(work: Path, why: str) -> None:
    """Let the training of `work` end with CapError after its next step. why : the message, not empty."""
    (work / _STOP).write_text(why, encoding="utf-8")


def stop_requested(work: Path) -> str:
    """Why the training shall stop; "" if it need not."""
    try:
        return (work / _STOP).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def forget_stop(work: Path) -> None:
    """Take the request back, so that the training goes on."""
    (work / _STOP).unlink(missing_ok=True)
