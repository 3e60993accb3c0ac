"""The figures of a comparison: the frontier of reward and KL, and reward against length; equal numbers give
equal bytes.

Variants are numbered in the order of the table, which is that of their rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qrpo_core.evaluation.comparison_results import ComparisonResult, ScorerResult, VariantFacts
from qrpo_core.evaluation.results import Estimate
from qrpo_core.reporting.comparison_text import ordered
from qrpo_core.reporting.html.canvas import COLOURS, new_figure, plain_ticks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2


def frontier_figure(result: ComparisonResult) -> Figure:
    """Gain over the reference policy against KL, one panel a scorer, with the line of the best."""

    def finish(axes: Axes, points: Mapping[str, tuple[Estimate, Estimate]], scored: ScorerResult) -> None:
        axes.axhline(0, color=COLOURS["line"], linewidth=0.8, zorder=0)
        axes.plot([0], [0], "x", color=COLOURS["before"], markersize=7)
        best = frontier([(kl.value, gain.value) for kl, gain in points.values()])
        axes.plot(*zip(*best, strict=True), color=COLOURS["accent"], linewidth=1.0, zorder=1)
        axes.set_xlabel("KL from the reference policy (nats)")

    return _panels(result, lambda facts: facts.kl, finish)


def length_bias_figure(result: ComparisonResult) -> Figure:
    """Gain against mean length, one panel a scorer, with what length alone brings the reference policy."""

    def finish(axes: Axes, points: Mapping[str, tuple[Estimate, Estimate]], scored: ScorerResult) -> None:
        axes.axhline(0, color=COLOURS["line"], linewidth=0.8, zorder=0)
        axes.plot([result.tokens_before], [0], "x", color=COLOURS["before"], markersize=7)
        slope = result.length_slopes.get(scored.scorer)
        if slope is not None:
            ends = [result.tokens_before, *(length.value for length, _ in points.values())]
            line = [slope * (end - result.tokens_before) for end in (min(ends), max(ends))]
            axes.plot([min(ends), max(ends)], line, "--", color=COLOURS["before"], linewidth=1.0)
        axes.set_xlabel("mean length (tokens)")

    return _panels(result, lambda facts: facts.tokens, finish)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) points that no other beats with less cost and more gain, by cost."""
    found: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or gain > found[-1][1]:
            found.append((cost, gain))
    return found


def _panels(
    result: ComparisonResult,
    across: Callable[[VariantFacts], Estimate | None],
    finish: Callable[[Axes, Mapping[str, tuple[Estimate, Estimate]], ScorerResult], None],
) -> Figure:
    """One panel a scorer: gain up, `across` to the right, with both intervals."""
    numbers = {name: place for place, name in enumerate(ordered(result), 1)}
    rows = -(-len(result.scorers) // _COLUMNS)
    columns = min(_COLUMNS, len(result.scorers))
    with style():
        figure = new_figure(0.3 + 2.5 * rows)
        for place, scored in enumerate(result.scorers):
            axes = figure.add_subplot(rows, columns, place + 1)
            points = {}
            for score in scored.variants:
                x = across(result.facts_of(score.variant))
                if x is not None:
                    points[score.variant] = (x, score.gain)
            for name, (x, gain) in points.items():
                _point(axes, x, gain, str(numbers[name]))
            if points:
                finish(axes, points, scored)
            axes.set_title(scored.scorer, loc="left", color=COLOURS["ink"])
            axes.set_ylabel("gain over the reference policy" if place % _COLUMNS == 0 else "")
            axes.margins(x=0.08, y=0.12)
            plain_ticks(axes)
        return figure


def _point(axes: Axes, x: Estimate, y: Estimate, label: str) -> None:
    bars = []
    if y.low is not None and y.high is not None:
        bars.append(([x.value, x.value], [y.low, y.high]))
    if x.low is not None and x.high is not None:
        bars.append(([x.low, x.high], [y.value, y.value]))
    for bar in bars:
        axes.plot(*bar, color=COLOURS["after"], linewidth=0.9, alpha=0.6)
    axes.plot([x.value], [y.value], "o", color=COLOURS["after"], markersize=4.5)
    axes.annotate(
        label, (x.value, y.value), xytext=(5, 4), textcoords="offset points", color=COLOURS["ink"], fontsize=8
    )
