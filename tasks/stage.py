"""The record of a finished stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """The record of a finished stage.

    reused, computed : rows of a row stage, or 1 artifact.
    state : "Cached" (the store had everything) or "Completed".
    seconds : wall time of the stage in this run.
    reused_seconds : what the reused part took when it was computed.
    """

    stage: str
    reused: int
    computed: int
    state: str
    seconds: float
    reused_seconds: float = 0.0
