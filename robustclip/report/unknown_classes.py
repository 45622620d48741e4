"""Shows the detection of unknown classes: tables, histograms of the scores, ROC curves, and curves over neighbours."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from robustclip.report.blocks import Block, Fold, Picture, Pictures, Table, Tables, Text, table_of_measures
from robustclip.report.plots import legend
from robustclip.report.section import Section
from robustclip.report.svg import INK, MUTED, ROBUST, draw, member_colour, run_entry, run_style
from robustclip.report.view import CLEAN, View, percent

ATTACKED = "attacked"
SEPARATION = {
    "auroc": "Known against unknown classes: AUROC, percent",
    "aupr": "Known against unknown classes: AUPR with known samples as the positives (AUPR-IN), percent",
    "aupr_out": "Known against unknown classes: AUPR with unknown samples as the positives (AUPR-OUT), percent",
    "fpr95": "Unknown samples that pass where 95 % of the known ones do (FPR95), percent",
    "fpr95_out": "Known samples that are rejected where 95 % of the unknown ones are (FPR95-OUT), percent",
    "autc": "Area under the threshold curve (AUTC, 0 is perfect), percent",
    "h": "Harmonic mean of class accuracy and AUROC (H), percent",
}
OF_TASKS = {
    "class_accuracy": "Mean accuracy of the known classes, percent",
    "ece": "Expected calibration error, percent",
}
SIDES = {"known": ROBUST, "unknown": member_colour(1)}
LINES = {CLEAN: "-", ATTACKED: (0, (4, 2))}
CORNER = "known / unknown"
NAMES = "further_names"  # key of the names that scores compare with beside the classes
VARIANTS = "variants"  # key of the measures of further columns of scores
CURVE = "knn"  # score whose variants are values of K
MEASURES = {"auroc": "-", "fpr95": (0, (4, 2))}


class UnknownClasses(Section):
    """Detection of unknown classes by scores."""

    title = "Unknown classes"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns settings, plots and tables, or nothing if no run measured the detection."""
        tables = _tables(views)
        if not tables:
            return []
        text = (
            "Known samples are the positives. The attack lowers the reported score of known images and raises "
            "that of unknown ones. Dashed lines and empty outlines show scores under attack."
        )
        settings = [Text(_settings(view), "aside") for view in views if view.part("detection")]
        drawn = [pair for pair in _pairs(views) if any("roc" in pair.of(view) for view in views)]
        plots = [_plots(views, pair, number) for number, pair in enumerate(drawn)]
        return [Text(text), *settings, legend(views), *plots, *_over_neighbours(views), Tables(tables)]


class Pair(NamedTuple):
    """A task, a set of unknown classes, and a score.

    Attributes:
        known: name of the task.
        unknown: name of the set of unknown classes.
        score: name of the score.
    """

    known: str
    unknown: str
    score: str

    def of(self, view: View) -> Mapping[str, Any]:
        """Returns the measures of a run; empty if it has none for this pair."""
        measures: Mapping[str, Any] = _against(view, self.known, self.unknown).get("scores", {}).get(self.score, {})
        return measures


def _tables(views: Sequence[View]) -> list[Table]:
    """Returns a table per measure with a column per run; empty tables are left out."""
    tables = []
    for measure, caption in SEPARATION.items():
        rows: dict[str, list[float | None]] = {}
        for pair in _pairs(views):
            name = f"{pair.known} / {pair.unknown}: {pair.score}"
            rows[name] = [pair.of(view).get(measure) for view in views]
            rows[f"{name}, {ATTACKED}"] = [pair.of(view).get(ATTACKED, {}).get(measure) for view in views]
            varied = [_varied(view, pair, measure) for view in views]
            for variant in dict.fromkeys(variant for values in varied for variant in values):
                rows[f"{name}, {variant}"] = [values.get(variant) for values in varied]
        tables.append(table_of_measures(caption, CORNER, views, rows))
    names = dict.fromkeys(name for view in views for name in _tasks(view))
    for measure, caption in OF_TASKS.items():
        rows = {name: [_tasks(view).get(name, {}).get(measure) for view in views] for name in names}
        tables.append(table_of_measures(caption, CORNER, views, rows))
    return [table for table in tables if table.rows]


def _varied(view: View, pair: Pair, measure: str) -> dict[str, float | None]:
    """Returns a measure of the variants of a score by their names; knn's are drawn instead."""
    variants = _against(view, pair.known, pair.unknown).get(VARIANTS, {})
    curve = variants.get(pair.score, {}) if pair.score != CURVE else {}
    return dict(zip(curve.get("names", ()), curve.get(measure, ()), strict=False))


def _tasks(view: View) -> Mapping[str, Any]:
    tasks: Mapping[str, Any] = view.part("detection").get("tasks", {})
    return tasks


def _against(view: View, known: str, unknown: str) -> Mapping[str, Any]:
    """Returns the measures of a task against a set of unknown classes; empty if the run has none."""
    measures: Mapping[str, Any] = _tasks(view).get(known, {}).get("unknown", {}).get(unknown, {})
    return measures


def _plots(views: Sequence[View], pair: Pair, number: int) -> Fold:
    """Draws ROC curves of all runs, and the histogram of each run."""
    having = [view for view in views if "roc" in pair.of(view)]
    pictures = [_roc(having, pair, f"roc-{number}")]
    pictures += [_histogram(view, pair, f"scores-{number}-{view.number}") for view in having]
    return Fold(f"{pair.known} against {pair.unknown}, {pair.score}", [Pictures(pictures)], is_open=number == 0)


def _roc(views: Sequence[View], pair: Pair, name: str) -> Picture:
    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        for view in views:
            for kind, curve in pair.of(view)["roc"].items():
                x, y = (100 * np.array(curve[side]) for side in ("unknown", "known"))
                style = {**run_style(view), "marker": ""}
                axes.plot(x, y, linestyle=LINES[kind], linewidth=1.6, clip_on=False, **style)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="unknown above the threshold, %", ylabel="known above it, %")
        axes.grid(axis="both")

    areas = "; ".join(f"{view.label}: {_areas(pair.of(view))}" for view in views)
    return Picture(draw(name, f"ROC of {pair.score}. {areas}", paint), "ROC")


def _histogram(view: View, pair: Pair, name: str) -> Picture:
    measures = pair.of(view)
    histogram = measures["histogram"]
    counts = {kind: histogram[kind] for kind in (CLEAN, ATTACKED) if kind in histogram}

    def paint(axes: Axes) -> None:
        low, high = histogram["range"]
        for kind, sides in counts.items():
            for side, colour in SIDES.items():
                shares = 100 * np.array(sides[side]) / sum(sides[side])
                edges = np.linspace(low, high, len(shares) + 1)
                if kind == CLEAN:
                    axes.stairs(shares, edges, fill=True, alpha=0.4, color=colour, label=side)
                else:
                    axes.stairs(shares, edges, linewidth=1.6, color=colour, label=f"{side}, {kind}")
        axes.set(xlabel=pair.score, ylabel="share of samples, %")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    text = f"Histograms of {pair.score} for known and unknown samples. {view.label}: {_areas(measures)}"
    return Picture(draw(name, text, paint), view.label, run_entry(view))


def _areas(measures: Mapping[str, Any]) -> str:
    attacked = f", {percent(measures[ATTACKED]['auroc'])} % attacked" if ATTACKED in measures else ""
    return f"AUROC {percent(measures['auroc'])} %{attacked}"


def _settings(view: View) -> str:
    settings = view.part("detection")
    positives = "correctly classified known samples" if settings.get("is_correct_only") else "all known samples"
    attack = f"attack {json.dumps(settings['attack'])}" if settings.get("attack") else "no attack"
    return "; ".join([f"{view.label}: {positives}", attack, *_further_names(view)])


def _further_names(view: View) -> list[str]:
    """Describes the names that scores compare a task with beside its classes, and how many of them are unknown ones."""
    sentences = []
    for task, summary in _tasks(view).items():
        for score, names in summary.get(NAMES, {}).items():
            for name, unknown in names["of_unknown"].items():
                number = "an unknown number" if unknown is None else len(unknown)
                beside = f"{score} compares {task} with {names['count']} further names"
                sentences.append(f"{beside}, {number} of which are classes of {name}")
    return sentences


def _sets(views: Sequence[View]) -> dict[tuple[str, str], None]:
    """Lists the pairs of a task and a set of unknown classes, in the order of the runs."""
    return {
        (known, unknown): None for view in views for known, task in _tasks(view).items() for unknown in task["unknown"]
    }


def _pairs(views: Sequence[View]) -> list[Pair]:
    scores = (
        (pair, score) for pair in _sets(views) for view in views for score in _against(view, *pair).get("scores", ())
    )
    return list(dict.fromkeys(Pair(*pair, score) for pair, score in scores))


def _over_neighbours(views: Sequence[View]) -> list[Block]:
    """Draws the score knn over K, a plot per known task and unknown set; nothing if no run has such a curve."""
    pairs = [pair for pair in _sets(views) if any(_curve(view, *pair) for view in views)]
    if not pairs:
        return []
    text = (
        "Solid lines show AUROC and dashed lines FPR95 of the distance to the K-th nearest training image. Large signs "
        "are at 1 % of the training images, which is the K of the score knn in the tables."
    )
    drawn = [_neighbour_plot(views, *pair, f"neighbours-{number}") for number, pair in enumerate(pairs)]
    return [Fold("knn over K", [Text(text), Pictures(drawn)], is_open=True)]


def _curve(view: View, known: str, unknown: str) -> Mapping[str, Any]:
    """Returns the measures of knn over K; empty if the run has none."""
    curve: Mapping[str, Any] = _against(view, known, unknown).get(VARIANTS, {}).get(CURVE, {})
    return curve


def _neighbour_plot(views: Sequence[View], known: str, unknown: str, name: str) -> Picture:
    having = [(view, curve) for view in views if (curve := _curve(view, known, unknown))]

    def paint(axes: Axes) -> None:
        for view, curve in having:
            own, style = Pair(known, unknown, CURVE).of(view), run_style(view)
            for measure, line in MEASURES.items():
                y = 100 * np.array(curve[measure], float)  # null, where there is no number, becomes nan
                axes.plot(
                    [int(k) for k in curve["names"]],
                    y,
                    linestyle=line,
                    markersize=4,
                    linewidth=1.6,
                    clip_on=False,
                    **style,
                )
                if own[measure] is not None:
                    at = [view.part("detection")["scores"][CURVE]["k"]], [100 * own[measure]]
                    axes.scatter(*at, s=80, edgecolor=INK, linewidth=1.2, zorder=4, clip_on=False, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(ylim=(0, 100), xlabel="K", ylabel="AUROC and FPR95, %")
        axes.grid(axis="both")

    areas = "; ".join(f"{view.label}: {_spoken(curve)}" for view, curve in having)
    return Picture(draw(name, f"AUROC of knn over K. {areas}", paint), f"{known} against {unknown}")


def _spoken(curve: Mapping[str, Sequence[Any]]) -> str:
    points = [(k, value) for k, value in zip(curve["names"], curve["auroc"], strict=True) if value is not None]
    return ", ".join(f"{percent(value)} % at {k}" for k, value in points)
