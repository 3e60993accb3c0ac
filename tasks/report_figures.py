"""The figures of a stored report, as images for Markdown.

They are cut out of the report's HTML, so a run that finds its report in the store draws nothing.
"""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass

#: A figure as `qrpo_core/reporting/html/report.html.j2` writes it.
_FIGURE = re.compile(
    r"<figure>\s*<h3>(.*?)</h3>\s*(<svg .*?</svg>)\s*<figcaption>(.*?)</figcaption>", re.DOTALL
)
_COLOUR = re.compile(r"var\(--[a-z]+, *(#[0-9a-f]{6})\)")


@dataclass(frozen=True)
class Figure:
    """A figure of a report; `image` is Markdown with an SVG on white in the colours of a light page."""

    title: str
    caption: str
    image: str


def figures(report: str) -> list[Figure]:
    """The figures of a report (its HTML), in its order."""
    return [
        Figure(html.unescape(title), html.unescape(caption), _image(html.unescape(title), svg))
        for title, svg, caption in _FIGURE.findall(report)
    ]


def _image(title: str, svg: str) -> str:
    # Outside the page, an SVG needs its namespace, and its colour variables have no values.
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" '
    alone = head + _COLOUR.sub(r"\1", svg).removeprefix("<svg ")
    label = re.sub(r"[\[\]]", "", title)
    return f"![{label}](data:image/svg+xml;base64,{base64.b64encode(alone.encode()).decode()})"
