"""The evaluation in words: one spelling of each number, for the terminal, the UI and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qrpo_core.errors import DataError
from qrpo_core.evaluation.metrics import (
    Estimate,
    EvaluationResult,
    JudgeResult,
    KLEstimate,
    SideSummary,
)

Verdict = Literal["good", "bad", "unclear"]

#: Below this many prompts a bootstrap interval over prompts is visibly too narrow (measured: about 90 %
#: coverage instead of 95 % for exponential rewards at 20 prompts, 95 % at 100).
FEW_PROMPTS = 20

#: A larger share of completions without a reward is named beside the result: their absence may select.
FEW_FAILED = 0.01

#: How far from 1 the normalisation check may be without a word.
NORMALISATION_TOLERANCE = 0.1


@dataclass(frozen=True)
class Outcome:
    """The result in one sentence and, where one is needed, a second that says what it does not show."""

    verdict: Verdict
    sentence: str
    caution: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.caution}".strip()


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """A number with fixed decimals, from 1e9 on in scientific notation; never "-0.0"."""
    sign = "+" if signed and value > 0 else ""
    if abs(value) >= 1e9:
        return f"{value:{sign}.3e}"
    text = f"{value:{sign},.{decimals}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text


def percent(share: float) -> str:
    """A share in per cent, one decimal; tiny but not zero, or nearly all but not all, says so."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def decimals_for(value: float, width: float | None) -> int:
    """Decimals that show two significant digits of `width` (an error or half an interval), at most 9.

    Without a width: three significant digits of the value.
    """
    scale, digits = (width, 2) if width else (abs(value), 3)
    if scale == 0:
        return digits
    return min(9, max(0, digits - 1 - math.floor(math.log10(scale))))


def with_error(value: float, error: float | None, unit: str = "") -> str:
    """`value ± standard error unit`; the error is left out where there is none."""
    decimals = decimals_for(value, error)
    text = number(value, decimals)
    if error is not None:
        text += f" ± {number(error, decimals)}"
    return f"{text} {unit}".rstrip()


def reward_decimals(result: EvaluationResult) -> int:
    """Decimals of every reward that is shown: those of the mean or difference that needs most."""
    rewards = (result.before.reward, result.after.reward, result.difference)
    return max(decimals_for(each.value, _half_width(each)) for each in rewards)


def spelled(result: EvaluationResult) -> dict[str, str]:
    """Every number of the evaluation as text, by name; all other places take their text from here."""
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
    text = spelled(result)
    level = f"{text['level']} interval"
    cut = f"{text['truncation_before']} → {text['truncation_after']}"
    return [
        ("Held-out prompts compared", f"{text['prompts']}, {text['samples']} completions each a side"),
        (f"Mean reward before ({level})", _joined(text["before"], text["before_interval"])),
        (f"Mean reward after ({level})", _joined(text["after"], text["after_interval"])),
        (f"Difference, paired ({level})", _joined(text["difference"], text["difference_interval"])),
        ("Prompts better / equal / worse", text["changed"]),
        (f"Win rate against the reference ({level})", _joined(text["win_rate"], text["win_rate_interval"])),
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


def kl_name(kl: KLEstimate) -> str:
    """What the mean log-ratio is, and in which arithmetic and at which temperature it was computed."""
    name = "KL(policy || reference)" if kl.unbiased else "Mean log-ratio (not a KL: see note)"
    at = f", temperature {kl.temperature:g}" if kl.temperature != 1 else ""
    return f"{name}, {kl.arithmetic} arithmetic{at}"


def _judge_rows(name: str, judge: JudgeResult, level: str) -> list[tuple[str, str]]:
    """What a judge that training never saw says of the same completions."""
    estimates = (judge.before, judge.after, judge.difference)
    decimals = max(decimals_for(each.value, _half_width(each)) for each in estimates)
    means = f"{number(judge.before.value, decimals)} → {number(judge.after.value, decimals)}"
    difference = number(judge.difference.value, decimals, signed=True)
    failed = sum(judge.not_ok_before.values()), sum(judge.not_ok_after.values())
    return [
        (f"Judge {name}: mean before → after", f"{means} on {judge.prompts:,} prompts"),
        (
            f"Judge {name}: difference, paired ({level})",
            _joined(difference, _interval(judge.difference, decimals, signed=True)),
        ),
        (
            f"Judge {name}: win rate ({level})",
            _joined(percent(judge.win_rate.value), _percent_interval(judge.win_rate)),
        ),
        (f"Judge {name}: completions without a score", f"{failed[0]:,} before, {failed[1]:,} after"),
    ]


def outcome(result: EvaluationResult) -> Outcome:
    """The result in a sentence that says plainly when nothing is shown or the policy got worse."""
    text, difference = spelled(result), result.difference
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
    """What makes even a clear interval doubtful: few prompts, or completions that have no reward."""
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


def normalisation(diagnostics: Mapping[str, Any]) -> tuple[str, Verdict, str] | None:
    """The normalisation check: mean exp(target / beta) over reference completions, which must be 1.

    Reads `normalisation_mean`, `normalisation_standard_error` and `normaliser` and returns the number as
    text, a verdict and what it means, or None where there is no such number. Far from 1 is more than
    `NORMALISATION_TOLERANCE` and more than three standard errors away.

    Raises DataError when the mean is NaN (infinity is a finding, not an error).
    """
    mean, error = diagnostics.get("normalisation_mean"), diagnostics.get("normalisation_standard_error")
    if mean is None:
        return None
    if math.isnan(mean):
        raise DataError(
            "normalisation_mean is NaN", where="report, diagnostics", remedy="look at the training targets"
        )
    # Rounding noise around 1 (the empirical normaliser) is no error worth nine decimals.
    error = error if error is not None and math.isfinite(error) and error > 1e-6 else None
    text, away = with_error(mean, error) if math.isfinite(mean) else str(mean), abs(mean - 1)
    if away > max(NORMALISATION_TOLERANCE, 3 * (error or 0)):
        advice = (
            "check beta and the number of references"
            if (diagnostics.get("normaliser") == "empirical")
            else "try normaliser: empirical"
        )
        return text, "bad", f"Far from 1: the normaliser does not fit this data, {advice}."
    if away > NORMALISATION_TOLERANCE or (error or 0) > NORMALISATION_TOLERANCE:
        return text, "unclear", "Consistent with 1, but too noisy to say more."
    if diagnostics.get("normaliser") == "empirical":
        return text, "good", "Is 1 by construction here: a check of the arithmetic."
    return text, "good", "Close to 1: the normaliser fits this data."


def _half_width(estimate: Estimate) -> float | None:
    if estimate.low is None or estimate.high is None:
        return None
    half = (estimate.high - estimate.low) / 2
    # Equal values resample to means that differ in the last bit; that is no width.
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


def _joined(value: str, interval: str) -> str:
    return f"{value} {interval}" if interval else f"{value} (one prompt: no interval)"


def _failed(side: SideSummary) -> str:
    kinds, text = statuses(side), f"{sum(side.not_ok.values()):,} of {side.completions:,}"
    return f"{text} ({kinds})" if kinds else text


def statuses(side: SideSummary) -> str:
    """How many completions have each status but ok; "" where all are ok."""
    return ", ".join(f"{name} {count:,}" for name, count in side.not_ok.items() if count)


def _left_out(result: EvaluationResult) -> str:
    where = {"before": "before", "after": "after", "both": "on both sides"}
    kinds = [f"no ok reward {where[side]}: {count:,}" for side, count in result.left_out.items() if count]
    total = sum(result.left_out.values())
    return f"{total:,} of {result.prompts + total:,}" + (f" ({'; '.join(kinds)})" if kinds else "")
