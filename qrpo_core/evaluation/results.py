"""The result of an evaluation as plain values, with a JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import with_config

from qrpo_core.evaluation.plain import PlainResult


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval; None with a single prompt."""

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
    unbiased : whether sampling used the whole policy (top_p 1), so that the value estimates KL.
    arithmetic : of both log-probs. temperature : of both policies.
    note : the meaning of the number, for readers.
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
    completions : rows of any status; lengths (tokens) and truncation_rate are over all of them.
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
    """The same completions by a judge that was not the reward of training; fields as in `EvaluationResult`.

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
class EvaluationResult(PlainResult):
    """The comparison of two policies.

    prompts : prompts compared, those with an ok reward on both sides; left_out counts the others.
    difference : mean over prompts of (mean reward after - mean reward before), paired.
    improved, unchanged, worsened : prompts by the sign of that difference.
    win_rate : mean over prompts of the share of (after, before) pairs with after > before, ties one half.
    tie_share : mean over prompts of the share of pairs that tie.
    samples_min, samples_max : completions a prompt, each side.
    judges : the comparison by each judge, by its name. silent_judges : those without a score on both sides of
        any prompt, each with the trained policy's rows by status.
    """

    what, remedy = "an evaluation result", "evaluate again"

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
    silent_judges: dict[str, dict[str, int]] = field(default_factory=dict)
