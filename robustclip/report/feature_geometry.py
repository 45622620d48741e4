"""Shows the geometry of the image features: tables, and a plot of the class scatter."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from robustclip.report.blocks import Block, Picture, Pictures, Tables, Text, table_of_measures
from robustclip.report.plots import legend
from robustclip.report.section import Section
from robustclip.report.svg import RULE, draw, run_style
from robustclip.report.view import MISSING, View

COLLAPSE = "collapse"  # key of the class scatter in a result
CAPTIONS = {
    COLLAPSE: "Class scatter, tr(S_within) / tr(S_between)",
    "pearson": "Similarity of pairs to the pre-trained model, Pearson",
    "spearman": "Similarity of pairs to the pre-trained model, Spearman",
}
FRAME, ROW = 0.9, 0.3  # inches


class Geometry(Section):
    """Class scatter, similarity to the pre-trained features, and retrieval."""

    title = "Geometry"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns a plot and tables, or nothing if no run measured the geometry."""
        rows = {measure: _rows(views, measure) for measure in CAPTIONS}
        tables = [table_of_measures(CAPTIONS[m], "set", views, by_set, _number) for m, by_set in rows.items()]
        tables.append(table_of_measures("Retrieval of captions, percent", "set", views, _recalls(views)))
        tables = [table for table in tables if table.rows]
        text = (
            "The class scatter is the scatter of the unit image features around their class means, divided by the "
            "scatter of these means: 0 where every class is a point. Correlations compare the cosines of all pairs of "
            "samples with those of the pre-trained model."
        )
        pictures = [Pictures([_picture(views, rows[COLLAPSE])])] if rows[COLLAPSE] else []
        return [Text(text), legend(views), *pictures, Tables(tables)] if tables else []


def _rows(views: Sequence[View], measure: str) -> dict[str, list[float | None]]:
    """Collects a number per run, for each task with any number."""
    names = dict.fromkeys(name for view in views for name in view.part("geometry"))
    rows = {name: _values(views, name, measure) for name in names}
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def _recalls(views: Sequence[View]) -> dict[str, list[float | None]]:
    measured = ((name, m) for view in views for name, values in view.part("geometry").items() for m in values)
    recalls = [(name, measure) for name, measure in dict.fromkeys(measured) if measure not in CAPTIONS]
    texts = [f"{name}: {measure.replace('_r', ', first ').replace('_', ' ')}" for name, measure in recalls]
    return {text: _values(views, *recall) for text, recall in zip(texts, recalls, strict=True)}


def _values(views: Sequence[View], name: str, measure: str) -> list[float | None]:
    return [view.part("geometry").get(name, {}).get(measure) for view in views]


def _picture(views: Sequence[View], rows: Mapping[str, Sequence[float | None]]) -> Picture:
    """Draws a line per task, from the run with the least class scatter to the run with the greatest."""

    def paint(axes: Axes) -> None:
        for place, (name, values) in enumerate([*rows.items()][::-1]):  # matplotlib counts from below
            present = [(view, value) for view, value in zip(views, values, strict=True) if value is not None]
            ends = [limit(value for _, value in present) for limit in (min, max)]
            axes.plot(ends, [place, place], color=RULE, linewidth=3, zorder=1)
            for view, value in present:
                title = f"{view.label}, {name}: {value:.3g}"
                axes.scatter([value], [place], s=45, linewidth=0, gid=title, zorder=2, **run_style(view))
        axes.set_yticks(range(len(rows)), list(rows)[::-1])
        axes.set_xlabel("within classes / between classes")
        axes.set_xlim(left=0)
        axes.grid(axis="x")

    labels = [view.label for view in views]
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{label} {_number(value)}" for label, value in zip(labels, values, strict=True))
        for name, values in rows.items()
    )
    picture = draw("collapse", f"Class scatter of every task. {alt}", paint, size=(5.0, FRAME + ROW * len(rows)))
    return Picture(picture, "Class scatter, before and after")


def _number(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3f}"
