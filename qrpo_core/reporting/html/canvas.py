"""The style of all figures, and their output as PNG and as inline SVG.

A PNG shows `COLOURS` on white. `figure_svg` turns each into a CSS variable with the colour as its fallback,
so that an inline figure follows the page's light or dark scheme.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: CSS variable → colour in a light scheme (Okabe-Ito blue and vermilion, and greys).
COLOURS = {
    "ink": "#1f2329",
    "muted": "#5b6471",
    "line": "#d3d8de",
    "before": "#7b8491",
    "after": "#0072b2",
    "accent": "#c84e00",
}

_WIDTH = 6.25  # inches: 600 px at 96 dpi, the width the sizes below are chosen for


def figure_png(figure: Figure, dpi: int = 144) -> bytes:
    """A figure as PNG on white, in light colours, for places that show no SVG."""
    with style():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def figure_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an <svg> element for HTML: no prolog, no links, colours as CSS variables.

    name : letters and digits; a prefix of every id, so that figures on one page do not share ids.
    description : the text alternative.
    """
    with style():
        buffer = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=144, transparent=True, metadata=none)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace('href="#', f'href="#{name}-')
    svg = svg.replace("url(#", f"url(#{name}-")
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None  # every SVG that matplotlib writes has one
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = f'<svg role="img" aria-label="{label}" {size.group()}>' + svg[svg.index(">") + 1 :]
    return re.sub(r">\s+<", "><", svg).strip()


def style() -> AbstractContextManager[None]:
    """The style of all figures; fixed ids and fonts as paths make the SVG reproducible."""
    import matplotlib

    muted, line = COLOURS["muted"], COLOURS["line"]
    settings = {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is everywhere the same
        "font.size": 8.5,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.parse_math": False,
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "path",
        "svg.hashsalt": "qrpo",
        "path.simplify": False,
    }
    context: AbstractContextManager[None] = matplotlib.rc_context(settings)
    return context


def new_figure(height: float) -> Figure:
    """An empty figure, made without pyplot: no global state, no display, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height))


def plain_ticks(axes: Axes, *, shares: bool = False) -> None:
    """Write every tick's number in full, without a common factor; a y axis of shares in per cent."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if shares else f"{value:g}")
