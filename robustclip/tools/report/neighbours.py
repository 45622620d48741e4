"""What the KNN score of `OODDetection` makes of more or fewer neighbours, as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from robustclip.tools.report.html import disclosure, escape, figure, tag
from robustclip.tools.report.svg import INK, MARKERS, draw, run_colour
from robustclip.tools.report.view import View, percent

LINES = {"auroc": "-", "fpr95": (0, (4, 2))}


def section(views: Sequence[View]) -> str:
    """A picture per known task and unknown set; nothing where no run has such a curve."""
    pairs = dict.fromkeys(
        (known, unknown)
        for view in views
        for known, task in view.detection.get("tasks", {}).items()
        for unknown in task["unknown"]
        if _curve(view, known, unknown)
    )
    if not pairs:
        return ""
    text = (
        "By the distance to the K-th nearest training image, AUROC as a solid and FPR95 as a dashed line. The large "
        "signs are at 1 % of the training images, which is the score knn of the tables."
    )
    drawn = [_picture(views, *pair, f"neighbours-{number}") for number, pair in enumerate(pairs)]
    return disclosure("knn over K", tag("p", text) + tag("div", *drawn, class_="pictures"), is_open=True)


def _picture(views: Sequence[View], known: str, unknown: str, name: str) -> str:
    having = [view for view in views if _curve(view, known, unknown)]

    def paint(axes: Axes) -> None:
        for view in having:
            curve, own = _curve(view, known, unknown), _found(view, known, unknown)["scores"]["knn"]
            style: dict[str, Any] = {"color": run_colour(view.number), "marker": MARKERS[view.number % len(MARKERS)]}
            for measure, line in LINES.items():
                y = 100 * np.array(curve[measure], float)  # null, where there is no number, becomes nan
                axes.plot(curve["k"], y, linestyle=line, markersize=4, linewidth=1.6, clip_on=False, **style)
                if own[measure] is not None:
                    at = [view.detection["knn"]["k"]], [100 * own[measure]]
                    axes.scatter(*at, s=80, edgecolor=INK, linewidth=1.2, zorder=4, clip_on=False, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(ylim=(0, 100), xlabel="K", ylabel="AUROC and FPR95, %")
        axes.grid(axis="both")

    told = "; ".join(f"{view.label}: {_told(_curve(view, known, unknown))}" for view in having)
    return figure(draw(name, f"AUROC of knn over K. {told}", paint), tag("b", escape(f"{known} against {unknown}")))


def _told(curve: Mapping[str, Sequence[Any]]) -> str:
    points = [(k, value) for k, value in zip(curve["k"], curve["auroc"], strict=True) if value is not None]
    return ", ".join(f"{percent(value)} % at {k}" for k, value in points)


def _curve(view: View, known: str, unknown: str) -> Mapping[str, Sequence[Any]]:
    curve: Mapping[str, Sequence[Any]] = _found(view, known, unknown).get("neighbours", {})
    return curve


def _found(view: View, known: str, unknown: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = view.detection.get("tasks", {}).get(known, {}).get("unknown", {}).get(unknown, {})
    return found
