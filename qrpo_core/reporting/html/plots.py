"""The report's figures; equal numbers give equal bytes.

Before is grey and filled, after is blue and a line (distinct in greyscale too), accents are vermilion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qrpo_core.common.errors import DataError
from qrpo_core.common.formatting import percent
from qrpo_core.evaluation.inputs import EvaluationInput, Floats, floats, strings
from qrpo_core.evaluation.metrics import PromptMeans
from qrpo_core.evaluation.results import Estimate, EvaluationResult
from qrpo_core.reporting.html.canvas import COLOURS, new_figure, plain_ticks, style
from qrpo_core.reporting.summary import result_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_PANELS = 8
#: More points than this become an embedded bitmap; as vectors they would weigh megabytes.
_MAX_VECTOR_POINTS = 1500
#: Quantile grids up to this fine get one bar for each possible value.
_MAX_GRID = 64

#: Curves in the order they are drawn; others follow by name.
_HISTORY_LABELS = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "log_ratio_error": "mean |target - log-ratio| (nats)",
    "label_error": "mean |label - prediction|",
    "log_ratio": "mean log-ratio (nats)",
    "sign_agreement": "log-ratio has its target's sign (share)",
    "grad_norm": "gradient norm",
    "accuracy": "pairs with the chosen side ahead (share)",
    "margin": "mean margin of chosen over rejected",
    "learning_rate": "learning rate",
    "completion_tokens": "mean completion length (tokens)",
    "clipped_steps": "steps whose gradient was clipped",
}
#: Curves that are drawn as a second line in another curve's panel.
_COMPANIONS = {"log_ratio": "log_ratio_target"}
_NOT_CURVES = {"step", "epoch", "total_flos"}


def reward_figure(means: PromptMeans, result: EvaluationResult) -> Figure:
    """Mean reward of each prompt before and after, and the paired differences; means with intervals above."""
    from matplotlib.ticker import MaxNLocator

    text = result_text(result)
    with style():
        figure = new_figure(2.8)
        strips, bodies = figure.subplots(
            2, 2, sharex="col", gridspec_kw={"height_ratios": (1, 3.4), "hspace": 0, "wspace": 0.06}
        )
        edges = _edges(means.before, means.after)
        filled = {"histtype": "stepfilled", "alpha": 0.4, "linewidth": 0}
        bodies[0].hist(means.before, edges, color=COLOURS["before"], **filled)
        bodies[0].hist(means.after, edges, histtype="step", color=COLOURS["after"], linewidth=1.6)
        bodies[0].set(xlabel="mean reward of a prompt", ylabel="prompts", xlim=_limits(edges, zero=False))
        middle = sum(bodies[0].get_xlim()) / 2
        for place, (name, side) in enumerate((("before", result.before), ("after", result.after))):
            right = side.reward.value < middle
            _interval(strips[0], side.reward, 1 - place, name, f"{name} {text[name]}", right)

        edges = _signed_edges(means.difference)
        bodies[1].hist(means.difference, edges, color=COLOURS["after"], **filled)
        bodies[1].set(xlabel="difference, after - before", ylabel="prompts", xlim=_limits(edges))
        for axes in (strips[1], bodies[1]):
            axes.axvline(0, color=COLOURS["accent"], linewidth=1.2)
        # The label stands on the side away from the line at zero.
        right = result.difference.value >= 0
        _interval(strips[1], result.difference, 0.5, "after", f"mean {text['difference']}", right)
        for axes in bodies:
            plain_ticks(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return figure


def quantile_figure(quantiles: Floats, steps: int | None = None) -> Figure:
    """Share of training completions at each quantile reward, against the uniform distribution.

    steps : the quantiles without ties are multiples of 1/steps (references a prompt, less the completion
        itself); where it is None or the values contradict it, the grid is found from the values.
    """
    if quantiles.size == 0 or not ((quantiles >= 0) & (quantiles <= 1)).all():
        raise DataError("quantiles must be numbers in [0, 1], at least one", where="report, training")
    bins = _quantile_bins(quantiles, steps)
    counts, edges = np.histogram(quantiles, bins=bins, range=(0, 1))
    shares = counts / quantiles.size
    with style():
        figure = new_figure(2.4)
        axes = figure.add_subplot()
        axes.bar(
            (edges[:-1] + edges[1:]) / 2, shares, 0.9 / bins, color=COLOURS["after"], alpha=0.45, linewidth=0
        )
        axes.axhline(1 / bins, color=COLOURS["accent"], linewidth=1.2)
        top = max(float(shares.max()), 1 / bins) * 1.18
        axes.set(xlim=(0, 1), ylim=(0, top), xlabel="quantile reward")
        axes.set_ylabel("share of training completions")
        plain_ticks(axes, shares=True)
        left = shares[: bins // 2].max(initial=0) <= shares[bins // 2 :].max(initial=0)
        _note(axes, 0.01 if left else 0.99, 1 / bins + 0.012 * top, f"uniform {percent(1 / bins)}", "accent")
        if shares.max() > 2 / bins:
            tallest = int(shares.argmax())
            x = float(edges[tallest] + edges[tallest + 1]) / 2
            _note(axes, x, shares[tallest] + 0.012 * top, percent(float(shares[tallest])), "after")
        return figure


def target_figure(log_ratio_targets: Floats) -> Figure:
    """Distribution of target / beta, in nats: the log-ratios that training aims at."""
    if log_ratio_targets.size == 0 or not np.isfinite(log_ratio_targets).all():
        raise DataError("targets must be finite, at least one", where="report, training")
    up, down = float((log_ratio_targets > 0).mean()), float((log_ratio_targets < 0).mean())
    with style():
        figure = new_figure(2.4)
        axes = figure.add_subplot()
        edges = _signed_edges(log_ratio_targets, most=40)
        weights = np.full(log_ratio_targets.size, 1 / log_ratio_targets.size)
        axes.hist(log_ratio_targets, edges, weights=weights, rwidth=0.9, color=COLOURS["after"], alpha=0.45)
        axes.axvline(0, color=COLOURS["accent"], linewidth=1.2)
        axes.set(xlim=_limits(edges), xlabel="target log-ratio, target / beta (nats)")
        axes.set_ylabel("share of training completions")
        plain_ticks(axes, shares=True)
        none = 1 - up - down
        title = f"pushed down {percent(down)}     pushed up {percent(up)}"
        if none > 1e-12:
            title += f"     target zero {percent(none)}"
        axes.set_title(title, loc="left", color=COLOURS["ink"])
        return figure


def training_figure(history: Sequence[Mapping[str, Any]], unit: str = "") -> tuple[Figure, list[str]] | None:
    """One panel for each curve of the trainer's log, over optimiser steps; None if there is no curve.

    unit : of the loss (`reporting.objective_names.loss_unit`).

    Also returns notes on curves that are not drawn: those beyond eight, and values that are not finite.
    """
    curves, notes = _curves(history)
    if not curves:
        return None
    seconds = {first: curves.pop(name) for first, name in _COMPANIONS.items() if {first, name} <= set(curves)}
    if len(curves) > _MAX_PANELS:
        notes.append("not drawn: " + ", ".join(list(curves)[_MAX_PANELS:]))
        curves = dict(list(curves.items())[:_MAX_PANELS])
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    with style():
        figure = new_figure(0.45 + 1.35 * rows)
        for place, (key, points) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            _curve(axes, points, seconds.get(key))
            label = _HISTORY_LABELS.get(key, key)
            label += f" ({unit})" if unit and key in ("loss", "eval_loss") else ""
            axes.set_title(label, loc="left", color=COLOURS["ink"])
            if place >= len(curves) - columns:
                axes.set_xlabel("optimiser step")
        return figure, notes


def length_figure(data: EvaluationInput) -> Figure:
    """Reward of every ok completion against its length, before and after, with means over length groups."""
    sides = []
    for table in (data.before, data.after):
        ok = strings(table, "status") == "ok"
        sides.append((floats(table, "num_tokens")[ok], floats(table, "reward")[ok]))
    if not all(length.size for length, _ in sides):
        raise DataError("a side has no ok reward", where="report", remedy="see the rewards' status")
    most = max(length.max() for length, _ in sides)
    with style():
        figure = new_figure(2.6)
        first: Axes | None = None
        for place, (name, (length, reward)) in enumerate(zip(("before", "after"), sides, strict=True)):
            axes = figure.add_subplot(1, 2, place + 1, sharex=first, sharey=first)
            bitmap = length.size > _MAX_VECTOR_POINTS
            axes.scatter(length, reward, s=7, c=COLOURS[name], alpha=0.35, linewidths=0, rasterized=bitmap)
            axes.plot(*_group_means(length, reward), color=COLOURS["accent"], linewidth=1.4, marker="o", ms=3)
            axes.set_title(name, loc="left", color=COLOURS[name], fontweight="bold")
            axes.set(xlabel="length (tokens)", xlim=(0, most * 1.04 + 1))
            plain_ticks(axes)
            if first is None:
                axes.set_ylabel("reward")
                first = axes
            else:
                axes.tick_params(labelleft=False)
        return figure


def _bin_width(*samples: Floats, most: int) -> tuple[float, bool]:
    """(width of common histogram bins, whether the values lie on a grid of that width).

    Off a grid: Freedman-Diaconis on the first sample, 8 to `most` bins over the range of all.
    """
    values = np.concatenate(samples)
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return max(abs(low) * 0.1, 0.1), False
    distinct = np.unique(values)
    gaps = np.diff(distinct)
    gap = float(gaps[gaps > 1e-9 * (high - low)].min())
    steps = (distinct - low) / gap
    if (high - low) / gap <= most and np.allclose(steps, steps.round(), atol=1e-6):
        return gap, True
    quartiles = np.percentile(samples[0], [25, 75])
    width = 2 * float(quartiles[1] - quartiles[0]) / len(samples[0]) ** (1 / 3)
    count = most if width == 0 else min(most, max(8, math.ceil(min((high - low) / width, 1e6))))
    return (high - low) / count, False


def _edges(*samples: Floats, most: int = 30) -> list[float]:
    """Common histogram edges; values on a grid are in the middle of their bins."""
    width, grid = _bin_width(*samples, most=most)
    low, high = min(each.min() for each in samples), max(each.max() for each in samples)
    pad = width / 2 if grid else 4.5 * width if low == high else 0.0
    count = round((high - low + 2 * pad) / width)
    return list(np.linspace(low - pad, high + pad, max(1, count) + 1))


def _signed_edges(values: Floats, most: int = 30) -> list[float]:
    """Histogram edges that separate the signs: zero is an edge, or the middle of a bin if it is a value."""
    width, grid = _bin_width(values, most=most)
    low, high = float(values.min()), float(values.max())
    zero_on_grid = grid and abs(low / width - round(low / width)) < 1e-6
    shift = width / 2 if zero_on_grid or (values == 0).any() else 0.0
    first, last = math.floor((low - shift) / width), math.floor((high - shift) / width) + 1
    edges = [place * width + shift for place in range(first, last + 1)]
    # The division may round across an edge, but no value may fall outside.
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]


def _limits(edges: Sequence[float], zero: bool = True) -> tuple[float, float]:
    """The limits of a histogram's axis, with a margin and, if `zero`, with zero inside."""
    low, high = min([*edges, *[0.0] * zero]), max([*edges, *[0.0] * zero])
    # A single bar as wide as the figure would look like a spread.
    room = (4 if len(edges) == 2 else 0.03) * (high - low)
    return low - room, high + room


def _quantile_bins(quantiles: Floats, steps: int | None) -> int:
    """Number of equal bins on [0, 1] that a uniform draw from the quantiles' grid fills equally.

    With m + 1 bins each multiple of 1/m has its own bin; with a divisor of m + 1 each group of them has one.
    """
    distinct = np.unique(quantiles)

    def on_grid(m: int) -> bool:
        return np.allclose(distinct * m, np.round(distinct * m), atol=1e-6, rtol=0)

    # Mid-ranks of ties fall halfway between two values of the grid.
    if steps is None or not on_grid(2 * steps):
        steps = next((m for m in range(1, _MAX_GRID + 1) if on_grid(m)), None)
    if steps is None:
        return 20
    if steps <= _MAX_GRID:
        return steps + 1
    return next((bins for bins in range(32, 9, -1) if (steps + 1) % bins == 0), 20)


def _curves(history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[tuple[float, float]]], list[str]]:
    """(points (step, value) of each numeric key, known keys first; notes on values that are left out)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    skipped: dict[str, int] = {}
    for place, entry in enumerate(history):
        if "step" not in entry:
            raise DataError("a log entry has no step", where=f"history, entry {place}", remedy="log it")
        for key, value in entry.items():
            # train_runtime and similar keys are totals at the end, not curves.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in _NOT_CURVES or key.startswith("train_") or not number:
                continue
            if not math.isfinite(value):
                skipped[key] = skipped.get(key, 0) + 1
            else:
                curves.setdefault(key, []).append((float(entry["step"]), float(value)))
    order = {key: place for place, key in enumerate(_HISTORY_LABELS)}
    ordered = sorted(curves, key=lambda key: (order.get(key, len(order)), key))
    notes = [f"{count} values of {key} are not finite" for key, count in sorted(skipped.items())]
    return {key: curves[key] for key in ordered}, notes


def _curve(axes: Axes, points: list[tuple[float, float]], second: list[tuple[float, float]] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    step, value = np.array(points).T
    marker = "o" if len(points) <= 30 else None
    axes.plot(step, value, color=COLOURS["after"], linewidth=1.4, marker=marker, markersize=2.5)
    if second:
        other_step, other = np.array(second).T
        axes.plot(other_step, other, color=COLOURS["accent"], linewidth=1.0)
        axes.set_title("target", loc="right", color=COLOURS["accent"])
    low, high = axes.get_ylim()
    if low <= 0 <= high:
        axes.axhline(0, color=COLOURS["line"], linewidth=0.8, zorder=0)
    axes.margins(x=0.03, y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    plain_ticks(axes)


def _group_means(length: Floats, reward: Floats, groups: int = 8) -> tuple[list[float], list[float]]:
    """Mean lengths and mean rewards of groups of similar length, about equally large."""
    parts = np.array_split(np.argsort(length, kind="stable"), min(groups, length.size))
    return [float(length[part].mean()) for part in parts], [float(reward[part].mean()) for part in parts]


def _interval(axes: Axes, estimate: Estimate, y: float, colour: str, label: str, right: bool) -> None:
    """A mean and its interval on a bare strip, with its label at one end."""
    ends = (estimate.value, estimate.value)
    if estimate.low is not None and estimate.high is not None:
        ends = (estimate.low, estimate.high)
        axes.plot(ends, [y, y], color=COLOURS[colour], linewidth=2.2, solid_capstyle="butt")
    axes.plot([estimate.value], [y], "o", color=COLOURS[colour], markersize=4.5)
    axes.annotate(
        label,
        (ends[1] if right else ends[0], y),
        xytext=(6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        color=COLOURS["muted"] if colour == "before" else COLOURS["after"],
    )
    axes.set_ylim(-0.7, 1.7)
    axes.axis("off")


def _note(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    align = "left" if x < 0.1 else "right" if x > 0.9 else "center"
    axes.text(x, y, text, color=COLOURS[colour], ha=align, va="bottom")
