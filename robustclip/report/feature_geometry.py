"""Shows the geometry of the image features: tables, and a plot of the class scatter."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from robustclip.report.blocks import Block, Cell, Picture, Pictures, Table, Tables, Text
from robustclip.report.plots import legend
from robustclip.report.section import Section
from robustclip.report.svg import RULE, draw, run_style
from robustclip.report.view import MISSING, View, percent

COLLAPSE = "collapse"
CAPTIONS = {
    COLLAPSE: "Class collapse, tr(S_within) / tr(S_between)",
    "pearson": "Similarity of pairs to the pre-trained model, Pearson",
    "spearman": "Similarity of pairs to the pre-trained model, Spearman",
}
FRAME, ROW = 0.9, 0.3  # inches


class Geometry(Section):
    """Class scatter, similarity to the pre-trained features, and retrieval."""

    title = "Geometry"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns a plot and tables, or nothing if no run measured the geometry."""
        tables = _tables(views)
        if not tables:
            return []
        text = (
            "Collapse divides the scatter of the unit image features around their class means by the scatter of these "
            "means: 0 where every class is a point. Correlations compare the cosines of all pairs of samples with "
            "those of the pre-trained model."
        )
        pictures = [Pictures([_picture(views)])] if _names(views, COLLAPSE) else []
        return [Text(text), legend(views), *pictures, Tables(tables)]


def _tables(views: Sequence[View]) -> list[Table]:
    """Returns a table per measure with a column per run, and one of the retrieval; empty tables are left out."""
    tables = []
    for measure, caption in CAPTIONS.items():
        rows = {name: [view.geometry.get(name, {}).get(measure) for view in views] for name in _names(views, measure)}
        tables.append(_table(caption, views, {name: [_number(value) for value in row] for name, row in rows.items()}))
    recalls = {}
    for name, measure in _recalls(views):
        values = [view.geometry.get(name, {}).get(measure) for view in views]
        text = measure.replace("_r", ", first ").replace("_", " ")
        recalls[f"{name}: {text}"] = [MISSING if value is None else percent(value) for value in values]
    tables.append(_table("Retrieval of captions, percent", views, recalls))
    return [table for table in tables if table.rows]


def _picture(views: Sequence[View]) -> Picture:
    """Draws a line per task, from the run with the least collapse ratio to the run with the greatest."""
    names = _names(views, COLLAPSE)[::-1]  # matplotlib counts from below

    def paint(axes: Axes) -> Mapping[str, str]:
        titles: dict[str, str] = {}
        for place, name in enumerate(names):
            values = {view.number: value for view in views if (value := _collapse(view, name)) is not None}
            axes.plot([min(values.values()), max(values.values())], [place, place], color=RULE, linewidth=3, zorder=1)
            for view in views:
                if view.number in values:
                    gid = f"{view.number}-{place}"
                    titles[gid] = f"{view.label}, {name}: {values[view.number]:.3g}"
                    at = [values[view.number]], [place]
                    axes.scatter(*at, s=45, linewidth=0, gid=gid, zorder=2, **run_style(view))
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("within classes / between classes")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        return titles

    alt = "; ".join(f"{name}: " + ", ".join(_described(view, name) for view in views) for name in names[::-1])
    picture = draw("collapse", f"Class collapse of every task. {alt}", paint, size=(5.0, FRAME + ROW * len(names)))
    return Picture(picture, "Class collapse, before and after")


def _names(views: Sequence[View], measure: str) -> list[str]:
    """Lists the tasks for which any run has a number, in the order of the runs."""
    names = (name for view in views for name, values in view.geometry.items() if values.get(measure) is not None)
    return list(dict.fromkeys(names))


def _recalls(views: Sequence[View]) -> list[tuple[str, str]]:
    pairs = ((name, measure) for view in views for name, values in view.geometry.items() for measure in values)
    return [(name, measure) for name, measure in dict.fromkeys(pairs) if measure not in CAPTIONS]


def _table(caption: str, views: Sequence[View], rows: Mapping[str, Sequence[str]]) -> Table:
    cells = [(name, [Cell(text) for text in texts]) for name, texts in rows.items()]
    return Table(caption, "set", [view.label for view in views], cells)


def _collapse(view: View, name: str) -> float | None:
    return view.geometry.get(name, {}).get(COLLAPSE)


def _described(view: View, name: str) -> str:
    return f"{view.label} {_number(_collapse(view, name))}"


def _number(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3f}"
