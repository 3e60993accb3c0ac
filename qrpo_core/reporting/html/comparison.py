"""The page of a comparison: table, frontier, lengths, and every difference; one self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qrpo_core.evaluation.comparison_results import ComparisonResult
from qrpo_core.reporting.comparison_text import (
    choice_rows,
    comparison_rows,
    doubts,
    failures,
    headline,
    method_text,
    pair_lines,
)
from qrpo_core.reporting.html import comparison_plots
from qrpo_core.reporting.html.page import ReportFigure, render_page

_FRONTIER = (
    "Each dot a variant by its row in the table, with its intervals; the cross is the reference policy, and "
    "the line joins the variants that no other beats in both. Good: high and to the left, by the judges as "
    "well. Bad: a gain by the reward that no judge confirms."
)
_LENGTHS = (
    "Gain against mean length. The cross is the reference policy; the dashed line is what its own "
    "completions gain with their length, within prompts. Good: above the line. Bad: along it, so that the "
    "gain is length."
)


def render_comparison(result: ComparisonResult, experiment: Mapping[str, Any]) -> str:
    """The comparison as one HTML file. experiment : the experiment as plain data, shown as YAML."""
    import yaml

    figures = [
        ReportFigure("frontier", "Reward against KL", _FRONTIER, comparison_plots.frontier_figure(result)),
        ReportFigure(
            "lengths", "Reward against length", _LENGTHS, comparison_plots.length_bias_figure(result)
        ),
    ]
    return render_page(
        "comparison.html.j2",
        figures,
        name=str(experiment.get("name", "experiment")),
        headline=headline(result),
        doubts=doubts(result),
        table=[[_unbroken(cell) for cell in row] for row in comparison_rows(result)],
        failures=failures(result),
        method=method_text(result),
        choosing=result.choosing,
        choices=choice_rows(result),
        pairs=pair_lines(result),
        settings=yaml.safe_dump(dict(experiment), sort_keys=False, allow_unicode=True, width=100),
    )


def _unbroken(cell: str) -> str:
    """The cell with spaces that do not break within an interval, a range of ranks or a share."""
    joined = re.sub(r"(?<=,) (?=[-+\d])| (?=%)", "\u00a0", cell)
    return joined.replace("–", "\u2060–\u2060")
