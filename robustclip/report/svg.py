"""Draws pictures by matplotlib in the page's own style: its colours in light and dark, its fonts, unique ids."""

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustclip.report.blocks import Entry
from robustclip.report.view import View

RUN_COLOURS = 6
MEMBER_COLOURS = 7
MARKERS = "os^DvPX"
MARKER_SIGNS = "●■▲◆▼✚✖"
# Placeholders that matplotlib draws with; `draw` puts the style sheet's variables in their place.
INK, RULE, PAPER = "#0a0a01", "#0a0a02", "#0a0a03"
WRONG, ROBUST = "#0a0a04", "#0a0a05"
MUTED = "#0a0a06"
FAILED_ALPHA = 0.35
NAMES = {INK: "ink", RULE: "rule", PAPER: "paper", WRONG: "wrong", ROBUST: "robust", MUTED: "muted"}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def run_colour(number: int) -> str:
    """Returns the placeholder of a run's colour; colours recur after `RUN_COLOURS` runs, with other markers."""
    return f"#0b0a{number % RUN_COLOURS:02x}"


def member_colour(number: int) -> str:
    """Returns the placeholder of the colour of an attack's member."""
    return f"#0c0a{number % MEMBER_COLOURS:02x}"


def run_entry(view: View) -> Entry:
    """Returns the legend entry of a run."""
    return Entry(f"sign run{view.number % RUN_COLOURS}", MARKER_SIGNS[view.number % len(MARKER_SIGNS)], view.label)


def run_style(view: View) -> dict[str, Any]:
    """Returns the colour and marker of a run; a run whose audit failed is drawn pale."""
    alpha = FAILED_ALPHA if view.has_failed else 1.0
    return {"color": run_colour(view.number), "marker": MARKERS[view.number % len(MARKERS)], "alpha": alpha}


def draw(name: str, alt: str, paint: Callable[[Axes], None], *, size: tuple[float, float] = (5.0, 3.6)) -> Markup:
    """Draws an inline picture; equal content gives equal bytes.

    Args:
        name: unique on the page; letters, digits and ``-``.
        alt: description of the picture, for readers who cannot see it.
        paint: draws on the axes; the gid of an artist is its tooltip.
        size: in inches; the page scales it to its column.
    """
    text = io.StringIO()
    settings: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        titles = {}
        for number, artist in enumerate(figure.findobj(lambda artist: artist.get_gid() is not None)):
            titles[f"mark{number}"] = str(artist.get_gid())
            artist.set_gid(f"mark{number}")
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return Markup(_follow_page(text.getvalue(), name, alt, titles))  # every text in it is escaped


def _follow_page(svg: str, name: str, alt: str, titles: Mapping[str, str]) -> str:
    svg = re.sub(r"^.*?<svg[^>]*viewBox", "<svg viewBox", svg, flags=re.DOTALL)
    svg = re.sub(r'(viewBox="[^"]*")[^>]*>', rf'\1 role="img" aria-label="{_literal(alt)}">', svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # before matplotlib 3.10
    svg = re.sub(r"; font-family: [^;\"]*", "", svg)
    svg = svg.replace("xlink:href", "href")
    for gid, title in titles.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(title)}</title>')
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for placeholder, variable in NAMES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    svg = re.sub(r"#0b0a(\w\w)", lambda match: f"var(--run{int(match[1], 16)})", svg)
    svg = re.sub(r"#0c0a(\w\w)", lambda match: f"var(--member{int(match[1], 16)})", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _literal(text: str) -> str:
    return html.escape(text).replace("\\", "\\\\")
