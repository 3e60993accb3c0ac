"""The figures of a stored report, as images for Markdown.

They are taken out of the report as they stand, so that a run whose report is in the store already shows them
without drawing anything.
"""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass

#: A figure as `qrpo_core/evaluation/report.html.j2` writes it.
_FIGURE = re.compile(
    r"<figure>\s*<h3>(.*?)</h3>\s*(<svg .*?</svg>)\s*<figcaption>(.*?)</figcaption>", re.DOTALL
)
_COLOUR = re.compile(r"var\(--[a-z]+, *(#[0-9a-f]{6})\)")


@dataclass(frozen=True)
class Figure:
    """A figure of a report, `image` as Markdown: an SVG on white with the colours of a light page."""

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
    # Alone, an SVG needs its namespace, and has no page that gives its variables a colour.
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" '
    alone = head + _COLOUR.sub(r"\1", svg).removeprefix("<svg ")
    label = re.sub(r"[\[\]]", "", title)
    return f"![{label}](data:image/svg+xml;base64,{base64.b64encode(alone.encode()).decode()})"
