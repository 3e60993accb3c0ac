"""What an evaluation found, as plain values that survive JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError, with_config

from qrpo_core.errors import DataError


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; None where one prompt allows none."""

    value: float
    low: float | None
    high: float | None


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class KLEstimate:
    """The mean log-ratio of the trained policy's completions, nats.

    value : mean over completions of log pi - log pi_ref.
    per_token : the same sum over all tokens of those completions.
    standard_error, per_token_standard_error : clustered by prompt; None with one prompt.
    unbiased : whether nothing of the policy was left out in sampling (top_p 1), so that it estimates KL.
    arithmetic : in which both log-probs were computed. temperature : of both policies.
    note : what the number is an estimate of, in words.
    """

    value: float
    standard_error: float | None
    per_token: float
    per_token_standard_error: float | None
    unbiased: bool
    arithmetic: str
    temperature: float
    note: str


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class SideSummary:
    """One policy on the held-out prompts.

    reward : mean over compared prompts of the prompt's mean reward.
    completions : rows, whatever their status; lengths (tokens) and truncation_rate are over all of them.
    not_ok : rows of every status but ok, zeros included.
    """

    reward: Estimate
    completions: int
    mean_length: float
    median_length: float
    truncation_rate: float
    not_ok: dict[str, int]


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class JudgeResult:
    """The same completions by a judge that training never saw; fields as in `EvaluationResult`.

    not_ok_before, not_ok_after : rows of every status but ok, zeros included.
    """

    prompts: int
    left_out: dict[str, int]
    before: Estimate
    after: Estimate
    difference: Estimate
    win_rate: Estimate
    tie_share: float
    not_ok_before: dict[str, int]
    not_ok_after: dict[str, int]


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class EvaluationResult:
    """The comparison, JSON-able.

    prompts : prompts compared, those with an ok reward on both sides; left_out counts the others.
    difference : mean over prompts of (mean reward after - mean reward before), paired.
    improved, unchanged, worsened : prompts by the sign of that difference.
    win_rate : mean over prompts of the share of (after, before) pairs with after > before, ties one half.
    tie_share : mean over prompts of the share of pairs that tie.
    samples_min, samples_max : completions a prompt, each side.
    judges : what each judge says of the same completions, by its name.
    """

    prompts: int
    left_out: dict[str, int]
    samples_min: int
    samples_max: int
    confidence: float
    resamples: int
    before: SideSummary
    after: SideSummary
    difference: Estimate
    improved: int
    unchanged: int
    worsened: int
    win_rate: Estimate
    tie_share: float
    kl: KLEstimate
    judges: dict[str, JudgeResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str | None = None) -> EvaluationResult:
        """The inverse of `to_dict`; a missing, unknown or mistyped field is a DataError that names it."""
        try:
            # Through JSON: pydantic's strict mode takes a mapping for a dataclass only from there.
            return TypeAdapter(cls).validate_json(json.dumps(dict(value)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"not an evaluation result: {key}: {first['msg']}", where=where, remedy="evaluate again"
            ) from None
