"""One stage of a plan: what is present and missing, why, and the time and place that it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """The expected cost of the missing part of a stage.

    seconds, low, high : wall time on its machine, and the interval around it.
    source : what the time was taken from, in words. gpus : held meanwhile.
    tokens : drawn, or of prompts and completions, of the missing rows; None where the stage counts none.
    at_most : whether `tokens` is an upper bound, since no completion has been drawn yet.
    """

    seconds: float
    low: float
    high: float
    source: str
    gpus: int
    tokens: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    present, missing : rows (or 1 artifact) that the store has, and that the run would compute.
    why : why rows are missing, stay without a reward or are left out.
    rate : rows a second of this recipe's blocks in the store; None without a measurement.
    row_tokens, row_bytes : means of this recipe's stored rows; None without.
    passes : completions that a training computes, all epochs together; 0 for other stages.
    rows_per_prompt : of the missing rows, or of all where none is missing; for training, completions a prompt
        and epoch.
    expected : its cost; None where nothing is missing or nothing is known.
    store_bytes : what it adds to the store; 0 where that is not known.
    note : a property of the present rows that matters for later stages; may be empty.
    """

    stage: str
    present: int
    missing: int
    why: str
    rate: float | None = None
    row_tokens: float | None = None
    row_bytes: float | None = None
    passes: float = 0.0
    rows_per_prompt: float = 1.0
    expected: Expected | None = None
    store_bytes: float = 0.0
    note: str = ""
