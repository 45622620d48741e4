"""What `OODDetection` measured, as tables, histograms of the scores and ROC curves."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from robustclip.tools.report import neighbours, plots, tables
from robustclip.tools.report.html import disclosure, escape, figure, tag
from robustclip.tools.report.svg import MUTED, ROBUST, draw, member_colour, run_colour
from robustclip.tools.report.tables import Cell, Table
from robustclip.tools.report.view import CLEAN, MISSING, View, percent

ATTACKED = "attacked"
SEPARATION = {
    "auroc": "Known against unknown classes: AUROC, percent",
    "aupr": "Known against unknown classes: AUPR, percent",
    "fpr95": "Unknown samples that pass where 95 % of the known ones do (FPR95), percent",
    "h": "Harmonic mean of class accuracy and AUROC (H), percent",
}
OF_TASKS = {
    "class_accuracy": "Mean accuracy of the known classes, percent",
    "ece": "Expected calibration error, percent",
}
SIDES = {"known": ROBUST, "unknown": member_colour(1)}
LINES = {CLEAN: "-", ATTACKED: (0, (4, 2))}


class Pair(NamedTuple):
    """A known task, an unknown set, and a score."""

    known: str
    unknown: str
    score: str

    def of(self, view: View) -> Mapping[str, Any]:
        """What a run found; empty if it has not measured it."""
        task = view.detection.get("tasks", {}).get(self.known, {})
        found: Mapping[str, Any] = task.get("unknown", {}).get(self.unknown, {}).get("scores", {}).get(self.score, {})
        return found


def detection_tables(views: Sequence[View]) -> list[Table]:
    """A table per measure with a column per run; none that would be empty."""
    found = []
    for measure, caption in SEPARATION.items():
        rows: dict[str, list[float | None]] = {}
        for pair in _pairs(views):
            name = f"{pair.known} / {pair.unknown}: {pair.score}"
            rows[name] = [pair.of(view).get(measure) for view in views]
            rows[f"{name}, {ATTACKED}"] = [pair.of(view).get(ATTACKED, {}).get(measure) for view in views]
        found.append(_table(caption, views, rows))
    for measure, caption in OF_TASKS.items():
        of_run = [view.detection.get("tasks", {}) for view in views]
        names = dict.fromkeys(name for tasks in of_run for name in tasks)
        found.append(
            _table(caption, views, {name: [tasks.get(name, {}).get(measure) for tasks in of_run] for name in names})
        )
    return [table for table in found if table.rows]


def section(views: Sequence[View]) -> str:
    """Tables and pictures in HTML; nothing where no run has measured it."""
    shown = detection_tables(views)
    if not shown:
        return ""
    text = (
        "Known samples are the positives. Under attack every image is moved against the score that is reported: known "
        "ones lower it, unknown ones raise it. Dashed lines and empty outlines are under attack."
    )
    attacks = [tag("p", escape(_told(view)), class_="aside") for view in views if view.detection]
    drawn = [pair for pair in _pairs(views) if any("roc" in pair.of(view) for view in views)]
    pictures = [_pictures(views, pair, number) for number, pair in enumerate(drawn)]
    return "".join(
        [
            tag("p", text),
            *attacks,
            plots.legend(views),
            *pictures,
            neighbours.section(views),
            tag("div", *map(tables.html, shown), class_="tables"),
        ]
    )


def _pictures(views: Sequence[View], pair: Pair, number: int) -> str:
    """ROC curves of all runs, and each run's histogram."""
    having = [view for view in views if "roc" in pair.of(view)]
    pictures = [_roc(having, pair, f"roc-{number}")]
    pictures += [_histogram(view, pair, f"scores-{number}-{view.number}") for view in having]
    summary = escape(f"{pair.known} against {pair.unknown}, {pair.score}")
    return disclosure(summary, tag("div", *pictures, class_="pictures"), is_open=number == 0)


def _roc(views: Sequence[View], pair: Pair, name: str) -> str:
    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        for view in views:
            for kind, curve in pair.of(view)["roc"].items():
                x, y = (100 * np.array(curve[side]) for side in ("unknown", "known"))
                axes.plot(x, y, color=run_colour(view.number), linestyle=LINES[kind], linewidth=1.6, clip_on=False)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="unknown above the threshold, %", ylabel="known above it, %")
        axes.grid(axis="both")

    told = "; ".join(f"{view.label}: {_areas(pair.of(view))}" for view in views)
    return figure(draw(name, f"ROC of {pair.score}. {told}", paint), tag("b", "ROC"))


def _histogram(view: View, pair: Pair, name: str) -> str:
    found = pair.of(view)
    counts = {kind: found["histogram"][kind] for kind in (CLEAN, ATTACKED) if kind in found["histogram"]}

    def paint(axes: Axes) -> None:
        low, high = found["histogram"]["range"]
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

    text = f"Histograms of {pair.score} for known and unknown samples. {view.label}: {_areas(found)}"
    return figure(draw(name, text, paint), plots.swatch(view.number) + tag("b", escape(view.label)))


def _areas(found: Mapping[str, Any]) -> str:
    attacked = f", {_percent(found[ATTACKED]['auroc'])} % attacked" if ATTACKED in found else ""
    return f"AUROC {_percent(found['auroc'])} %{attacked}"


def _told(view: View) -> str:
    attack = view.detection.get("attack")
    positives = "rightly classified known samples" if view.detection.get("is_correct_only") else "all known samples"
    return f"{view.label}: {positives}; {'attack ' + json.dumps(attack) if attack else 'no attack'}"


def _pairs(views: Sequence[View]) -> list[Pair]:
    return list(dict.fromkeys(pair for view in views for pair in _pairs_of(view)))


def _pairs_of(view: View) -> Iterator[Pair]:
    for known, task in view.detection.get("tasks", {}).items():
        for unknown, found in task["unknown"].items():
            yield from (Pair(known, unknown, score) for score in found["scores"])


def _table(caption: str, views: Sequence[View], rows: Mapping[str, Sequence[float | None]]) -> Table:
    cells = [
        (name, [Cell(_percent(value)) for value in values])
        for name, values in rows.items()
        if any(value is not None for value in values)
    ]
    return Table(caption, "known / unknown", [view.label for view in views], cells)


def _percent(value: float | None) -> str:
    return MISSING if value is None else percent(value)
