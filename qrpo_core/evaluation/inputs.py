"""The input of an evaluation: the same held-out rows under both policies, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import COMPLETIONS, REWARDS, STATUSES, check_table

Floats = npt.NDArray[np.float64]

#: One side of the comparison: completions joined with their rewards by (prompt_id, sample_index).
EVALUATED = pa.schema(
    [COMPLETIONS.field(name) for name in ("prompt_id", "sample_index", "text", "num_tokens", "finish_reason")]
    + [REWARDS.field("reward"), REWARDS.field("status")]
)

#: The trained policy's side also has both log-probs of each completion, sums over tokens in nats.
EVALUATED_AFTER = pa.schema(
    [
        *EVALUATED,
        pa.field("policy_logprob", pa.float64(), False),
        pa.field("ref_logprob", pa.float64(), False),
    ]
)


@dataclass(frozen=True)
class EvaluationInput:
    """Completions of the same held-out prompts under both policies, checked and sorted on construction.

    before : the reference policy's rows, schema `EVALUATED`.
    after : the trained policy's rows, schema `EVALUATED_AFTER`; both log-probs at `temperature`, in float32
        arithmetic.
    temperature, top_p : sampling settings of both sides; they decide whether the KL estimate is unbiased.

    Raises DataError for an empty table, a repeated (prompt_id, sample_index), a number that is not finite,
    a reward without status ok or the reverse, and for sides with different rows.
    """

    before: pa.Table
    after: pa.Table
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise DataError(
                f"temperature {self.temperature}, top_p {self.top_p} cannot be sampling settings",
                remedy="give the settings both sides were sampled with",
            )
        object.__setattr__(self, "before", _checked(self.before, EVALUATED, "evaluation, before"))
        object.__setattr__(self, "after", _checked(self.after, EVALUATED_AFTER, "evaluation, after"))
        _same_rows(self.before, self.after)


@dataclass(frozen=True)
class RewardedPair:
    """Completions of the same prompts under both policies with their rewards, without log-probs.

    before, after : EVALUATED rows, checked and sorted on construction as in `EvaluationInput`.
    """

    before: pa.Table
    after: pa.Table
    where: str

    def __post_init__(self) -> None:
        for side in ("before", "after"):
            table = _checked(getattr(self, side), EVALUATED, f"{self.where}, {side}")
            object.__setattr__(self, side, table)
        _same_rows(self.before, self.after)


def _checked(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table, cast and sorted by (prompt_id, sample_index); raises DataError for a bad row."""
    table = check_table(table, schema, where)
    if not table.num_rows:
        raise DataError("no completions to evaluate", where=where, remedy="hold out at least one prompt")
    table = table.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
    prompts, index = strings(table, "prompt_id"), floats(table, "sample_index")
    repeated = np.concatenate([[False], (prompts[1:] == prompts[:-1]) & (index[1:] == index[:-1])])
    _refuse(table, repeated, where, "more than one row", "join each table by (prompt_id, sample_index)")
    for column, known in (("status", STATUSES), ("finish_reason", ("stop", "length"))):
        unknown = ~np.isin(strings(table, column), known)
        _refuse(table, unknown, where, f"unknown {column}", f"known are {', '.join(known)}")
    ok = strings(table, "status") == "ok"
    has_reward = table["reward"].is_valid().to_numpy()
    _refuse(table, ok & ~has_reward, where, "status ok without a reward", "annotate it again")
    _refuse(table, ~ok & has_reward, where, "a reward without status ok", "annotate it again")
    for column in ("reward", "policy_logprob", "ref_logprob"):
        if column in schema.names:
            valid = table[column].is_valid().to_numpy()
            bad = valid & ~np.isfinite(floats(table, column))
            _refuse(table, bad, where, f"{column} is not finite", "find out what produced it")
    _refuse(table, floats(table, "num_tokens") < 0, where, "num_tokens below 0", "sample it again")
    return table


def _refuse(table: pa.Table, bad: npt.NDArray[np.bool_], where: str, message: str, remedy: str) -> None:
    if bad.any():
        row = table.slice(int(np.argmax(bad)), 1).to_pylist()[0]
        place = f"{where}, {row['prompt_id']}:{row['sample_index']}"
        raise DataError(f"{message} ({int(bad.sum())} rows)", where=place, remedy=remedy)


def _same_rows(before: pa.Table, after: pa.Table) -> None:
    """Raise DataError unless both sides have the same (prompt_id, sample_index): the comparison is paired."""
    keys = [
        set(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        for table in (before, after)
    ]
    remedy = "sample and annotate both policies on the same held-out prompts"
    for level, name in ((0, "prompts"), (1, "samples")):
        ids = [{key[0] if level == 0 else f"{key[0]}:{key[1]}" for key in side} for side in keys]
        for side, extra in (("before", ids[0] - ids[1]), ("after", ids[1] - ids[0])):
            if extra:
                shown = ", ".join(sorted(extra)[:5]) + (", ..." if len(extra) > 5 else "")
                raise DataError(
                    f"{len(extra)} {name} only in {side!r}: {shown}", where="evaluation", remedy=remedy
                )


def strings(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column without nulls as an array of strings."""
    return np.array(table[name].to_pylist(), dtype=np.str_)


def floats(table: pa.Table, name: str) -> Floats:
    """A column as float64, null as NaN."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
