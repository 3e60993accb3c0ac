"""The page of the pool report: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qrpo_core.common.formatting import percent
from qrpo_core.evaluation.judge_agreement import RESAMPLES, JudgeAgreement
from qrpo_core.evaluation.pool_report import LengthFacts, PoolReport
from qrpo_core.evaluation.results import Estimate
from qrpo_core.reporting.html.canvas import COLOURS, new_figure, plain_ticks, style
from qrpo_core.reporting.html.page import ReportFigure, render_page
from qrpo_core.reporting.pool_text import (
    group_rows,
    headline,
    headlines,
    interval,
    judge_rows,
    more_rows,
    reward_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AGREEMENT = (
    "Left: the judge's mean quantile among the judged completions of a prompt. The line is the fit that "
    "stops rising where the data no longer show a rise (shaded: the interval of that place). Right: "
    "agreement on the pairs with both completions at this quantile or above. Good: the left one rises and "
    "the right one stays above 50 %, up to the right end. Bad: flat to the right, so that training on the "
    "top of the reward buys nothing that the judge sees."
)


def render_pool_report(report: PoolReport) -> str:
    """The pool report as one HTML file."""
    judged = {name: each.agreement for name, each in report.judges.items() if each.agreement is not None}
    warned = any(each.severity == "warning" for each in headlines(report))
    return render_page(
        "pool.html.j2",
        list(_figures(report)),
        name=report.name,
        verdict="bad" if warned else "good" if judged else "",
        headline=headline(report),
        headlines=headlines(report),
        tiles=_tiles(report),
        rewards=reward_rows(report),
        more=more_rows(report),
        judges=judge_rows(report) if report.judges else [],
        groups={name: group_rows(found) for name, found in judged.items()},
        interval_note=(
            f"Intervals: percentile bootstrap over prompts, {RESAMPLES:,} resamples, level "
            f"{percent(report.confidence)}."
        ),
    )


def _tiles(report: PoolReport) -> list[dict[str, str]]:
    found = []
    for name, judged in report.judges.items():
        if (agreement := judged.agreement) is not None:
            note = interval(agreement.agreement, shares=True) or "needs two prompts"
            value = percent(agreement.agreement.value)
            found.append((f"Pairs on which {name} agrees", value, note, "" if agreement.follows else "bad"))
    spread, more = report.spread, report.more
    free = f"{spread.signal_free_prompts:,} of {spread.prompts:,}"
    found.append(("Prompts without signal", free, f"{percent(spread.tie_rate)} of references tie", ""))
    length = report.length.rank_correlation
    value, note = ("none", "constant") if length is None else (f"{length.value:+.2f}", interval(length))
    found.append(("Rank correlation with length", value, note, ""))
    signs, then = more.signs, more.signs_then
    if signs is not None and then is not None:
        note = f"{percent(then.right)} with {more.additional} more references a prompt"
        found.append(("Targets with the right sign", percent(signs.right), note, ""))
    return [dict(zip(("label", "value", "note", "verdict"), each, strict=True)) for each in found]


def _figures(report: PoolReport) -> Iterator[ReportFigure]:
    for number, (name, judged) in enumerate(report.judges.items()):
        if judged.agreement is not None:
            yield ReportFigure(
                "judge" + "abcdefghijklmnopqrstuvwxyz"[number % 26] * (number // 26 + 1),
                f"Judge {name} by quantile of the reward",
                _AGREEMENT,
                agreement_figure(judged.agreement),
            )
    if len(report.length.groups) > 1:
        yield ReportFigure(
            "length",
            "The reward by length",
            "Tenths of the length's rank within prompts. Good: level at 0.5. Bad: a slope, which a policy "
            "follows by writing longer or shorter.",
            length_figure(report.length),
        )


def agreement_figure(found: JudgeAgreement) -> Figure:
    """The judge's mean quantile with its fit, and the agreement from each quantile up."""
    with style():
        figure = new_figure(2.7)
        left, right = figure.subplots(1, 2)
        middles = [(group.low + group.high) / 2 for group in found.groups]
        place = found.stops_rising
        if found.follows and place.low is not None and place.high is not None and place.value < 1:
            left.axvspan(place.low, place.high, color=COLOURS["line"], alpha=0.5, linewidth=0)
        edges = np.array([[group.low, group.high] for group in found.groups]).ravel()
        fitted = np.repeat([group.fitted for group in found.groups], 2)
        left.plot(edges, fitted, color=COLOURS["accent"], linewidth=1.4)
        _points(left, middles, [group.judge for group in found.groups])
        left.set(xlabel="quantile of the reward", ylabel="judge's mean quantile")
        above = [(group.low, group.agreement) for group in found.groups if group.agreement is not None]
        _points(right, [low for low, _ in above], [each for _, each in above])
        right.set(xlabel="both at this quantile or above")
        right.set_ylabel("agreement on pairs")
        for axes in (left, right):
            axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
            axes.set(xlim=(0, 1), ylim=(0, 1))
            plain_ticks(axes, shares=axes is right)
        return figure


def length_figure(length: LengthFacts) -> Figure:
    """Mean quantile of the reward at the mean length of each group."""
    tokens, quantiles = zip(*length.groups, strict=True)
    with style():
        figure = new_figure(2.2)
        axes = figure.add_subplot()
        axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
        axes.plot(tokens, quantiles, color=COLOURS["after"], marker="o", markersize=3.5, linewidth=1.2)
        axes.set(xlabel="mean length (tokens)", ylabel="reward's mean quantile", ylim=(0, 1))
        plain_ticks(axes)
        return figure


def _points(axes: Axes, places: list[float], found: list[Estimate]) -> None:
    """Estimates with their intervals."""
    for place, each in zip(places, found, strict=True):
        if each.low is not None and each.high is not None:
            axes.plot([place, place], [each.low, each.high], color=COLOURS["after"], linewidth=1.1)
    values = [each.value for each in found]
    axes.plot(places, values, "o", color=COLOURS["after"], markersize=3)
