"""The report's tables and tiles as rows of text for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qrpo_core.common.errors import DataError
from qrpo_core.common.formatting import number, percent
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES
from qrpo_core.reporting.summary import (
    normalisation,
    outcome,
    result_text,
    reward_decimals,
    statuses,
    survival_tile,
)

_DIAGNOSTICS = {
    "objective": "Objective",
    "normaliser": "Normaliser (log Z)",
    "tie_method": "Ties count as",
    "transform": "Transform f",
    "truncation": "lambda, the quantile up to which completions are given up",
    "candidates": "N of the best of N",
    "value_beta": "Temperature of the value V, reward units",
    "beta": "beta, reward units",
    "temperature": "Temperature of log-ratios, of policy and reference",
    "reference_logprobs": "Reference log-probs",
    "mean_beta": "beta over length, mean",
    "beta_max_binds": "Completions whose beta over length was cut to beta_max",
    "references": "Reference completions",
    "references_per_prompt": "References a prompt, mean",
    "training_prompts": "Training prompts",
    "training_rows": "Training completions",
    "training_samples": "Of these, samples of the policy",
    "training_offline": "Of these, completions of the data set",
    "training_pairs": "Training pairs",
    "prompts_with_too_few_references": "Prompts left out: too few scored references",
    "log_partition_above_tie_aware": "Mean log Z above the tie-aware one, nats",
    "tie_rate": "References that tie with another",
    "largest_atom": "Share of a prompt's commonest reward, mean",
    "signal_free_prompts": "Prompts without signal (all rewards equal)",
    "better_than_all_references": "Training completions no reference beats",
    "worse_than_all_references": "Training completions that beat no reference",
    "quantile_distance_from_uniform": "Distance from uniform (Kolmogorov-Smirnov) of the quantiles of "
    "completions that are no references",
    "length_correlation": "Correlation of reward with log length, within prompts",
    "positive_targets": "Completions with a positive target",
    "largest_log_ratio_target": "Largest target, nats",
    "smallest_log_ratio_target": "Smallest target, nats",
    "zero_targets": "Completions that the policy is to give up: target -inf, in no figure",
    "target_clip": "Limit of a target's log-ratio, nats",
    "target_clip_binds": "Completions whose target was cut to it",
}
_SHARES = {
    "tie_rate",
    "largest_atom",
    "better_than_all_references",
    "worse_than_all_references",
    "positive_targets",
}
_STAGE_COLUMNS = ("stage", "rows", "reused", "computed", "blocks", "seconds", "note")


def tiles(
    result: EvaluationResult,
    diagnostics: Mapping[str, Any],
    saved: Sequence[Mapping[str, Any]] = (),
    drawn: Mapping[str, Any] | None = None,
) -> list[dict[str, str]]:
    """The key numbers: label, value, note, and a verdict that sets the colour (empty for none)."""
    text = result_text(result)
    verdict = outcome(result).verdict
    cut_note = "at the length limit, before → after"
    interval = " ".join([text["level"], "interval", text["difference_interval"] or "needs two prompts"])
    ties = f"{text['win_rate_interval']}, {text['ties']} of pairs tie".lstrip(", ")
    found = [
        ("Difference in mean reward", text["difference"], interval, verdict),
        ("Win rate against the reference", text["win_rate"], ties, ""),
        (
            "KL from the reference" if result.kl.unbiased else "Mean log-ratio (not a KL)",
            text["kl"],
            f"{text['kl_per_token']} a token, {result.kl.arithmetic} arithmetic",
            "",
        ),
        (
            "Mean length",
            f"{text['length_before']} → {text['length_after']}",
            "completion tokens, before → after",
            "",
        ),
        ("Truncated", f"{text['truncation_before']} → {text['truncation_after']}", cut_note, ""),
    ]
    found += survival_tile(saved, drawn)
    for check in normalisation(diagnostics):
        if not check.where or check.verdict == "bad":
            label = f"Normalisation check, {check.where}".removesuffix(", ")
            found.append((label, check.numbers, check.meaning, check.verdict))
    return [dict(zip(("label", "value", "note", "verdict"), tile, strict=True)) for tile in found]


def objective_rows(diagnostics: Mapping[str, Any], *, has_targets: bool = True) -> list[tuple[str, str]]:
    """Labels and values of the training data's diagnostics; unknown keys appear under their own name.

    has_targets : whether completions have targets; only with them is beta a number in reward units.
    """
    rows = []
    for check in normalisation(diagnostics):
        label = f"Normalisation check, mean exp(target / beta), {check.where}".removesuffix(", ")
        rows.append((label, f"{check.numbers}. {check.meaning}"))
    shown = {
        f"{prefix}_{name}"
        for prefix in ("normalisation", "held_out")
        for name in ("mean", "expected", "standard_error", "prompts")
    }
    for key in [*_DIAGNOSTICS, *(key for key in diagnostics if key not in _DIAGNOSTICS)]:
        if key in diagnostics and key not in shown:
            value = diagnostics[key]
            text = percent(value) if key in _SHARES and value is not None else _plain(value)
            if key == "objective":
                text = str(OBJECTIVE_NAMES[value])
            label = "beta" if key == "beta" and not has_targets else _DIAGNOSTICS.get(key, key)
            rows.append((label, text))
    return rows


def clipped_rows(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many steps had their gradient clipped; no row where nothing was to be clipped."""
    counts = [entry["clipped_steps"] for entry in history if "clipped_steps" in entry]
    if not counts:
        return []
    return [("Steps whose gradient was clipped", f"{sum(counts):,.0f} of {len(counts):,}")]


def interval_note(result: EvaluationResult) -> str:
    """A sentence on the method of the intervals."""
    return (
        f"Intervals: percentile bootstrap over prompts, {result.resamples:,} resamples, level "
        f"{result_text(result)['level']}. Every prompt weighs the same, however many of its rows are scored."
    )


def filtered(given: Sequence[Mapping[str, Any]], result: EvaluationResult) -> dict[str, Any]:
    """Rows left out or failed, in the pipeline and in the evaluation; zeros included."""
    rows = [
        (_get(row, "what", "filtered"), _get(row, "count", "filtered"), str(row.get("why", "")))
        for row in given
    ]
    for name, side in (("before", result.before), ("after", result.after)):
        what = f"held-out completions without a reward, {name}"
        rows.append((what, sum(side.not_ok.values()), statuses(side) or "every one was scored"))
    left_out = sum(result.left_out.values())
    why = result_text(result)["left_out"] if left_out else "every one has an ok reward on both sides"
    rows.append(("held-out prompts left out of the comparison", left_out, why))
    return {
        "all_zero": not any(count for _, count, _ in rows),
        "rows": [(str(what), _plain(count), why, bool(count)) for what, count, why in rows],
    }


def stages(given: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column names, known ones first, and one row of text a stage; empty columns are left out."""
    for place, row in enumerate(given):
        _get(row, "stage", f"stages, row {place}")
    extra = {key for row in given for key in row} - set(_STAGE_COLUMNS)
    columns = [key for key in (*_STAGE_COLUMNS, *sorted(extra)) if any(key in row for row in given)]
    spell = {"seconds": lambda value: _seconds(value) if value != "" else ""}
    rows = [[spell.get(key, _plain)(row.get(key, "")) for key in columns] for row in given]
    # The values have their unit, so the head does not.
    return ["time" if key == "seconds" else key for key in columns], rows


def example(row: Mapping[str, Any], place: int, result: EvaluationResult) -> dict[str, str]:
    """One example as text; rewards have the decimals of the mean rewards."""
    where = f"examples, row {place}"
    decimals = reward_decimals(result)
    values = {key: str(_get(row, key, where)) for key in ("prompt", "before", "after")}
    for key in ("reward_before", "reward_after"):
        values[key] = number(_get(row, key, where), decimals)
    values["label"] = str(row.get("label", f"example {place + 1}"))
    values["change"] = ""
    if "mean_before" in row and "mean_after" in row:
        ends = [number(row[key], decimals) for key in ("mean_before", "mean_after")]
        values["change"] = f"mean reward of this prompt {ends[0]} → {ends[1]}"
    return values


def _get(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{key!r} is missing", where=f"report, {where}", remedy=f"it has {sorted(row)}")
    return row[key]


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
