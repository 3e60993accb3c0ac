"""The evaluation as text: one spelling of each number for the terminal, the UI and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qrpo_core.common.errors import DataError
from qrpo_core.common.formatting import decimals_for, number, percent, with_error
from qrpo_core.evaluation.results import Estimate, EvaluationResult, JudgeResult, KLEstimate, SideSummary
from qrpo_core.training.survival import LOWEST_SHARE, survival_text

Verdict = Literal["good", "bad", "unclear"]

#: Below this many prompts a bootstrap interval over prompts is visibly too narrow (measured: about 90 %
#: coverage instead of 95 % for exponential rewards at 20 prompts, 95 % at 100).
FEW_PROMPTS = 20

#: A larger share of completions without a reward is reported beside the result: their absence may be a bias.
FEW_FAILED = 0.01

#: The normalisation check is bad if the mean is further from the expected one than this share of it, and than
#: this many standard errors.
NORMALISATION_TOLERANCE, NORMALISATION_ERRORS = 0.1, 4.0


@dataclass(frozen=True)
class Outcome:
    """The result in one sentence, with a caution if it shows less than it seems to."""

    verdict: Verdict
    sentence: str
    caution: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.caution}".strip()


def reward_decimals(result: EvaluationResult) -> int:
    """The decimals of every reward: those of the mean or difference that needs most."""
    rewards = (result.before.reward, result.after.reward, result.difference)
    return max(decimals_for(each.value, half_width(each)) for each in rewards)


def result_text(result: EvaluationResult) -> dict[str, str]:
    """Every number of the evaluation as text, by name."""
    decimals = reward_decimals(result)
    before, after, kl = result.before, result.after, result.kl
    samples = f"{result.samples_min}" + (
        f" to {result.samples_max}" if result.samples_max != result.samples_min else ""
    )
    return {
        "prompts": f"{result.prompts:,}",
        "samples": samples,
        "level": f"{100 * result.confidence:g} %",
        "before": number(before.reward.value, decimals),
        "after": number(after.reward.value, decimals),
        "difference": number(result.difference.value, decimals, signed=True),
        "before_interval": _interval(before.reward, decimals),
        "after_interval": _interval(after.reward, decimals),
        "difference_interval": _interval(result.difference, decimals, signed=True),
        "changed": f"{result.improved:,} / {result.unchanged:,} / {result.worsened:,}",
        "win_rate": percent(result.win_rate.value),
        "win_rate_interval": _percent_interval(result.win_rate),
        "ties": percent(result.tie_share),
        "kl": with_error(kl.value, kl.standard_error, "nats"),
        "kl_per_token": with_error(kl.per_token, kl.per_token_standard_error, "nats"),
        "length_before": number(before.mean_length, 1),
        "length_after": number(after.mean_length, 1),
        "median_before": number(before.median_length, 1),
        "median_after": number(after.median_length, 1),
        "truncation_before": percent(before.truncation_rate),
        "truncation_after": percent(after.truncation_rate),
        "failed_before": _failed(before),
        "failed_after": _failed(after),
        "left_out": _left_out(result),
    }


def summary_rows(result: EvaluationResult) -> list[tuple[str, str]]:
    """(label, value) rows of the evaluation's table, the same for the terminal, the UI and the report."""
    text = result_text(result)
    level = f"{text['level']} interval"
    cut = f"{text['truncation_before']} → {text['truncation_after']}"
    return [
        ("Held-out prompts compared", f"{text['prompts']}, {text['samples']} completions each a side"),
        (f"Mean reward before ({level})", _with_interval(text["before"], text["before_interval"])),
        (f"Mean reward after ({level})", _with_interval(text["after"], text["after_interval"])),
        (f"Difference, paired ({level})", _with_interval(text["difference"], text["difference_interval"])),
        ("Prompts better / equal / worse", text["changed"]),
        (
            f"Win rate against the reference ({level})",
            _with_interval(text["win_rate"], text["win_rate_interval"]),
        ),
        ("Ties among the pairs", text["ties"]),
        (f"{kl_name(result.kl)} ± standard error", text["kl"]),
        ("The same, per token", text["kl_per_token"]),
        ("Mean length before → after, tokens", f"{text['length_before']} → {text['length_after']}"),
        ("Median length before → after, tokens", f"{text['median_before']} → {text['median_after']}"),
        ("Cut by the length limit before → after", cut),
        ("Completions without a reward, before", text["failed_before"]),
        ("Completions without a reward, after", text["failed_after"]),
        ("Prompts left out", text["left_out"]),
        *(row for name, judge in result.judges.items() for row in _judge_rows(name, judge, level)),
    ]


def change_text(difference: Estimate) -> str:
    """A difference with its interval: +0.08 [+0.01, +0.15]."""
    decimals = decimals_for(difference.value, half_width(difference))
    text = number(difference.value, decimals, signed=True)
    return f"{text} {_interval(difference, decimals, signed=True)}".strip()


def kl_name(kl: KLEstimate) -> str:
    """The name of the mean log-ratio, with its arithmetic and temperature."""
    name = "KL(policy || reference)" if kl.unbiased else "Mean log-ratio (not a KL: see note)"
    at = f", temperature {kl.temperature:g}" if kl.temperature != 1 else ""
    return f"{name}, {kl.arithmetic} arithmetic{at}"


def _judge_rows(name: str, judge: JudgeResult, level: str) -> list[tuple[str, str]]:
    """Rows of a judge that was not the reward of training, on the same completions."""
    estimates = (judge.before, judge.after, judge.difference)
    decimals = max(decimals_for(each.value, half_width(each)) for each in estimates)
    means = f"{number(judge.before.value, decimals)} → {number(judge.after.value, decimals)}"
    difference = number(judge.difference.value, decimals, signed=True)
    failed = sum(judge.not_ok_before.values()), sum(judge.not_ok_after.values())
    return [
        (f"Judge {name}: mean before → after", f"{means} on {judge.prompts:,} prompts"),
        (
            f"Judge {name}: difference, paired ({level})",
            _with_interval(difference, _interval(judge.difference, decimals, signed=True)),
        ),
        (
            f"Judge {name}: win rate ({level})",
            _with_interval(percent(judge.win_rate.value), _percent_interval(judge.win_rate)),
        ),
        (f"Judge {name}: completions without a score", f"{failed[0]:,} before, {failed[1]:,} after"),
    ]


def outcome(result: EvaluationResult) -> Outcome:
    """The result in a sentence; it states plainly if no change is shown or the policy got worse."""
    text, difference = result_text(result), result.difference
    prompts = f"{text['prompts']} held-out prompt" + ("s" if result.prompts != 1 else "")
    rewards = f"from {text['before']} to {text['after']}"
    caution = _few_or_failed(result)
    if difference.low is None or difference.high is None:
        sentence = f"Mean reward went {rewards} on {prompts}, a difference of {text['difference']}."
        return Outcome("unclear", sentence, caution)
    by = f"{text['difference']} ({text['level']} interval {text['difference_interval']})"
    if result.unchanged == result.prompts:
        sentence = f"Mean reward did not change on any of {prompts}: {text['before']} before and after."
        return Outcome("unclear", sentence, caution)
    if difference.low > 0:
        sentence = f"Mean reward rose {rewards} on {prompts}: {by}."
        return Outcome("good", sentence, caution)
    if difference.high < 0:
        sentence = f"Mean reward fell {rewards} on {prompts}: {by}."
        caution = f"By this reward the trained policy is worse than the reference. {caution}".strip()
        return Outcome("bad", sentence, caution)
    negative = ", and what there is is negative" if difference.value < 0 else ""
    caution = f"The interval includes zero: no change is shown{negative}. {caution}".strip()
    return Outcome("unclear", f"Mean reward went {rewards} on {prompts}: {by}.", caution)


def _few_or_failed(result: EvaluationResult) -> str:
    """Doubts about a clear interval: few prompts, or completions without a reward."""
    parts = []
    if result.prompts == 1:
        parts.append("One prompt allows no interval: this says nothing about other prompts.")
    elif result.prompts < FEW_PROMPTS:
        parts.append(f"With fewer than {FEW_PROMPTS} prompts the interval is narrower than its level says.")
    for name, side in (("before", result.before), ("after", result.after)):
        failed = sum(side.not_ok.values())
        if failed > FEW_FAILED * side.completions:
            parts.append(
                f"{failed:,} of {side.completions:,} completions {name} have no reward: not counted."
            )
    return " ".join(parts)


@dataclass(frozen=True)
class NormalisationText:
    """One line of the normalisation check: where it was made, the numbers, and what they mean."""

    where: str
    numbers: str
    verdict: Verdict
    meaning: str


def normalisation(diagnostics: Mapping[str, Any]) -> list[NormalisationText]:
    """The normalisation check, first of the completions drawn, then of held-out references; [] without it.

    The check compares the mean of exp(target / beta) with the value expected under the normaliser in use. Bad
    is more than `NORMALISATION_TOLERANCE` of that value and `NORMALISATION_ERRORS` standard errors away.

    Raises DataError if the mean is NaN (infinity is a finding, not an error).
    """
    lines = []
    for prefix, where in (("normalisation", ""), ("held_out", "held-out references")):
        if (mean := diagnostics.get(f"{prefix}_mean")) is None:
            continue
        if math.isnan(mean):
            raise DataError(
                f"{prefix}_mean is NaN", where="report, diagnostics", remedy="look at the training targets"
            )
        expected, error = diagnostics.get(f"{prefix}_expected"), diagnostics.get(f"{prefix}_standard_error")
        # Rounding noise (all references are samples) would ask for nine decimals.
        error = error if error is not None and math.isfinite(error) and error > 1e-6 else 0.0
        shown = with_error(mean, error or None) if math.isfinite(mean) else str(mean)
        if expected is None:
            meaning = "Would be 1 with log Z known: further from 1, the less sure log Z is where rewards tie."
            lines.append(NormalisationText(where, shown, "unclear", meaning))
            continue
        verdict, meaning = _compared(mean, expected, error, str(diagnostics.get("normaliser")))
        lines.append(NormalisationText(where, f"{shown} ({expected:.3g} expected)", verdict, meaning))
    return lines


def _compared(mean: float, expected: float, error: float, normaliser: str) -> tuple[Verdict, str]:
    away = abs(mean - expected)
    far = away > NORMALISATION_TOLERANCE * expected
    if far and away > NORMALISATION_ERRORS * error:
        advice = (
            "the targets are not those of this data"
            if normaliser == "tie_aware"
            else "this data has ties that it does not count, try normaliser: tie_aware"
        )
        return "bad", f"Far from the value that normaliser {normaliser} implies: {advice}."
    if far or error > NORMALISATION_TOLERANCE * expected:
        return "unclear", "Consistent with the expected value, but too noisy to say more."
    return "good", f"As normaliser {normaliser} implies."


def half_width(estimate: Estimate) -> float | None:
    """Half of an estimate's interval; None without one, or where it is rounding alone."""
    if estimate.low is None or estimate.high is None:
        return None
    half = (estimate.high - estimate.low) / 2
    # Equal values resample to means that differ in the last bit: their width is zero.
    return half if half > 1e-12 * max(abs(estimate.low), abs(estimate.high)) else None


def _interval(estimate: Estimate, decimals: int, *, signed: bool = False) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (number(end, decimals, signed=signed) for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]"


def _percent_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{percent(estimate.low)}, {percent(estimate.high)}]"


def _with_interval(value: str, interval: str) -> str:
    return f"{value} {interval}" if interval else f"{value} (one prompt: no interval)"


def _failed(side: SideSummary) -> str:
    kinds, text = statuses(side), f"{sum(side.not_ok.values()):,} of {side.completions:,}"
    return f"{text} ({kinds})" if kinds else text


def statuses(side: SideSummary) -> str:
    """The number of completions of each status but ok; "" if all are ok."""
    return ", ".join(f"{name} {count:,}" for name, count in side.not_ok.items() if count)


def _left_out(result: EvaluationResult) -> str:
    where = {"before": "before", "after": "after", "both": "on both sides"}
    kinds = [f"no ok reward {where[side]}: {count:,}" for side, count in result.left_out.items() if count]
    total = sum(result.left_out.values())
    return f"{total:,} of {result.prompts + total:,}" + (f" ({'; '.join(kinds)})" if kinds else "")


def survival_rows(
    saved: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """(label, value) rows on the share of training in the saved policies and in the engine's copy.

    saved : facts of each round's saved policy. drawn : facts of the copy from which rewards after training
    were drawn (`pipeline.engine_copy`); None if the engine used the policy itself.
    """
    rows = []
    for round_number, facts in enumerate(saved, 1):
        where = f", round {round_number}" if len(saved) > 1 else ""
        rows.append((f"Saved policy{where}, {facts['dtype']}", survival_text(facts)))
    if drawn is not None:
        rows.append((f"Rewards after are drawn from a {drawn['dtype']} copy", survival_text(drawn)))
    return rows


def survival_tile(
    saved: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None
) -> list[tuple[str, str, str, str]]:
    """The report's tile as (label, value, note, verdict); empty if nothing was measured."""
    if not saved:
        return []
    shares = [facts["share"] for facts in saved if facts["share"] is not None]
    value = percent(min(shares)) if shares else "unmoved"
    note = f"in the saved policy ({saved[-1]['dtype']})"
    if drawn is not None and drawn["share"] is not None:
        note += f"; {percent(drawn['share'])} in the {drawn['dtype']} copy that rewards were drawn from"
    return [("Training that survived", value, note, "bad" if engine_copy_warning(drawn) else "")]


def engine_copy_warning(drawn: Mapping[str, Any] | None) -> str:
    """A sentence if too little of the training is in the copy that the engine drew from; else empty."""
    if drawn is None or drawn["share"] is None or abs(drawn["share"] - 1) <= 1 - LOWEST_SHARE:
        return ""
    return (
        f"Rewards after are those of a {drawn['dtype']} copy that has {percent(drawn['share'])} of the "
        "training, not those of the saved policy: set model.dtype: float32."
    )
