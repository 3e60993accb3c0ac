"""The common parts of all HTML pages: their style, and figures as inline SVG.

A page has no script and makes no request: styles and figures are inside the file, and its content policy
forbids anything else. All text from a model or a data set is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from qrpo_core.reporting.html.canvas import figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its name (letters only), title, and a caption on good and bad results."""

    name: str
    title: str
    caption: str
    figure: Figure


def render_page(template: str, figures: Sequence[ReportFigure], **values: Any) -> str:
    """A template of this folder as one self-contained HTML file.

    values : what the template shows, besides `style` and `figures` (name, title, caption, svg).
    """
    import jinja2
    from markupsafe import Markup

    drawn = [
        {
            "name": each.name,
            "title": each.title,
            "caption": each.caption,
            "svg": Markup(figure_svg(each.figure, each.name, f"{each.title}. {each.caption}")),
        }
        for each in figures
    ]
    folder = files("qrpo_core.reporting.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string((folder / template).read_text(encoding="utf-8"))
    style = Markup((folder / "page.css").read_text(encoding="utf-8").rstrip())
    return page.render(style=style, figures=drawn, **values)
