"""Benchmarks as rows of text: one spelling for the terminal, the UI and the report."""

from __future__ import annotations

from collections.abc import Mapping

from qrpo_core.common.formatting import decimals_for, number, percent
from qrpo_core.evaluation.benchmarks import BenchmarkResult
from qrpo_core.evaluation.results import Estimate, SideSummary
from qrpo_core.reporting.summary import half_width

_MEANS = {"code": "Share of tests passed, mean", "alpaca_eval": "Judge's preference over the baseline, mean"}


def benchmark_rows(benchmarks: Mapping[str, BenchmarkResult]) -> list[tuple[str, str]]:
    """(label, value) rows of every benchmark, by its name; values are before → after training."""
    return [(f"{name}: {label}", value) for name, each in benchmarks.items() for label, value in _rows(each)]


def _rows(result: BenchmarkResult) -> list[tuple[str, str]]:
    rows = [("prompts compared", f"{result.prompts:,}{_left_out(result)}")]
    if result.trained_on:
        rows.append(("prompts that training had, too", f"{result.trained_on:,}"))
    for metric, label in (
        ("length_controlled_winrate", "Length-controlled win rate, % ± standard error"),
        ("win_rate", "Win rate, % ± standard error"),
    ):
        if all(metric in result.alpaca_eval.get(side, {}) for side in ("before", "after")):
            error = "lc_standard_error" if metric.startswith("length") else "standard_error"
            sides = [
                f"{found[metric]:.2f} ± {found[error]:.2f}"
                for found in (result.alpaca_eval["before"], result.alpaca_eval["after"])
            ]
            rows.append((label, " → ".join(sides)))
    name = _MEANS.get(result.kind, "Mean reward")
    rows.append((name, _change(result.before.reward, result.after.reward, result.difference)))
    if result.solved_before and result.solved_after and result.solved_difference:
        solved = _change(result.solved_before, result.solved_after, result.solved_difference)
        rows.append(("Solved, share with the full reward", solved))
    before, after = result.before, result.after
    rows.append(("Mean length, tokens", f"{before.mean_length:.1f} → {after.mean_length:.1f}"))
    cut = f"{percent(before.truncation_rate)} → {percent(after.truncation_rate)}"
    rows.append(("Cut by the length limit", cut))
    rows.append(("Completions without a reward", f"{_failed(before)} → {_failed(after)}"))
    return rows


def _change(before: Estimate, after: Estimate, difference: Estimate) -> str:
    decimals = max(decimals_for(each.value, half_width(each)) for each in (before, after, difference))
    text = f"{number(before.value, decimals)} → {number(after.value, decimals)}, difference "
    text += number(difference.value, decimals, signed=True)
    if difference.low is None or difference.high is None:
        return text
    ends = (number(end, decimals, signed=True) for end in (difference.low, difference.high))
    return f"{text} [{', '.join(ends)}]"


def _failed(side: SideSummary) -> str:
    failed = {status: count for status, count in side.not_ok.items() if count}
    kinds = ", ".join(f"{count:,} {status}" for status, count in failed.items())
    return f"{sum(failed.values()):,} of {side.completions:,}" + (f" ({kinds})" if kinds else "")


def _left_out(result: BenchmarkResult) -> str:
    count = sum(result.left_out.values())
    return f", {count:,} left out without a reward on both sides" if count else ""
