"""Plots accuracy: against the radius, clean against robust, and between two sets of weights."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from robustclip.report.blocks import Block, Legend, Picture, Pictures, Text
from robustclip.report.section import Section
from robustclip.report.svg import INK, MARKERS, MUTED, draw, run_colour, run_entry, run_style
from robustclip.report.view import CLEAN, LEVEL, Score, View, union
from robustclip.results.protocol import digest

SCALES_WITH_RADIUS = ("alpha", "step_size")  # settings that may differ between radii of the same attack
GREY_LEVELS = 255
Point = tuple[float, Score]


class TradeOff(Section):
    """Accuracy against the radius, and clean against robust accuracy."""

    title = "Clean and robust"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns the plots side by side, or nothing if no run has an attack."""
        attacks = union(views, of="attacks")
        if not attacks:
            return []
        text = (
            "The curves show mean accuracy against the radius of the attack; radius 0 is the clean image, and bands "
            f"are {LEVEL} intervals. One plot holds attacks that differ in the radius alone. Other plots show clean "
            "against robust accuracy: a small mark per task, a large one for the mean, and a dashed line for an attack "
            "without any success. Pale marks belong to runs with a failed audit."
        )
        curves, lines = _curves(views)
        scatters = [_scatter(views, name, f"scatter-{i}") for i, name in enumerate(attacks)]
        asides = [Text(line, "aside") for line in lines]
        return [Text(text), legend(views), Pictures([*curves, *scatters]), *asides]


class Interpolation(Section):
    """Accuracy of models between the original and a fine-tuned one."""

    title = "Interpolation"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns one plot per fine-tuned model with at least two interpolations, or nothing."""
        pictures = [_interpolation(line, f"alpha-{number}") for number, line in enumerate(interpolations(views))]
        text = (
            "Means over the tasks of the models between the original and a fine-tuned one; "
            f"bands are {LEVEL} intervals."
        )
        return [Text(text), Pictures(pictures)] if pictures else []


def legend(views: Sequence[View]) -> Legend:
    """Returns the legend of all runs: marker, colour and name."""
    return Legend("Runs", [run_entry(view) for view in views])


def radius(view: View, attack: str) -> tuple[str, float] | None:
    """Reads norm and radius of an attack from its protocol.

    Args:
        view: the run.
        attack: name of the attack.

    Returns:
        Norm and radius in pixel values of [0, 1]; None if the attack has no finite radius.
    """
    axes = next((view.axes(task, attack) for task in view.scores if view.axes(task, attack)), {})
    eps = axes.get("eps")
    parts = str(next(iter(eps.values()), "") if isinstance(eps, dict) else eps).split()
    try:
        norm, value = parts[0], float(parts[1])
    except (IndexError, ValueError):
        return None
    return (norm, value) if math.isfinite(value) else None


def _curves(views: Sequence[View]) -> tuple[list[Picture], list[str]]:
    """Draws a plot per kind of attack over its radii, and writes lines about attacks that no plot can show."""
    groups: dict[str, list[str]] = {}
    without = []
    for attack in union(views, of="attacks"):
        having = next(view for view in views if attack in view.attacks)
        if radius(having, attack) is None:
            without.append(attack)
        else:
            groups.setdefault(_kind(having, attack), []).append(attack)
    pictures = [_curve(views, attacks, f"curve-{number}") for number, attacks in enumerate(groups.values())]
    lone = [attacks[0] for attacks in groups.values() if len(attacks) == 1]
    line = f"Measured at one radius only: {', '.join(lone)}. The line joins it to the clean accuracy."
    lines = [line] if lone else []
    lines += [f"No curve shows {', '.join(without)}: the radius is not known."] if without else []
    return pictures, lines


def _curve(views: Sequence[View], attacks: Sequence[str], name: str) -> Picture:
    lines = {view.number: _points(view, attacks) for view in views}
    limits = (radius(view, attack) for view in views for attack in attacks if attack in view.attacks)
    norm = next(limit[0] for limit in limits if limit)
    scale = GREY_LEVELS if norm == "linf" else 1

    def paint(axes: Axes) -> None:
        for view in views:
            points = lines[view.number]
            _band(axes, [scale * eps for eps, _ in points], [score for _, score in points], run_style(view))
        ticks = sorted({scale * eps for points in lines.values() for eps, _ in points})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xlabel(f"radius, {norm}" + (f", in 1/{GREY_LEVELS}" if norm == "linf" else ""))
        axes.set_ylabel("mean accuracy, %")
        axes.set_ylim(0, 100)
        axes.grid(axis="y")

    text = "; ".join(f"{view.label}: {_described(lines[view.number], scale)}" for view in views)
    return Picture(draw(name, f"Mean accuracy against radius. {text}", paint), ", ".join(attacks))


def _band(axes: Axes, x: Sequence[float], scores: Sequence[Score], style: Mapping[str, Any]) -> None:
    """Draws accuracies in percent, with a band between the limits of their intervals."""
    y, low, high = ([100 * getattr(score, of) for score in scores] for of in ("value", "low", "high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18 * style["alpha"], linewidth=0)
    axes.plot(x, y, markersize=5.5, linewidth=1.6, clip_on=False, **style)


def _points(view: View, attacks: Sequence[str]) -> list[Point]:
    points = [(0.0, view.mean[CLEAN])] if CLEAN in view.mean else []
    for attack in attacks:
        limit = radius(view, attack) if attack in view.attacks else None
        if limit:
            points.append((limit[1], view.mean[attack]))
    return sorted(points, key=lambda point: point[0])


def _described(points: Sequence[Point], scale: float = 1) -> str:
    return ", ".join(f"{score.text} % at {scale * eps:.3g}" for eps, score in points)


def _kind(view: View, attack: str) -> str:
    """Returns a digest of an attack without its radius and step lengths, which groups attacks to one curve."""
    axes = next(view.axes(task, attack) for task in view.scores if view.axes(task, attack))
    steps = axes.get("steps")
    if isinstance(steps, dict):
        steps = {name: _without_lengths(given) for name, given in steps.items()}
    limit = radius(view, attack)
    return digest(json.loads(json.dumps([limit and limit[0], steps, axes.get("loss")], default=str)))


def _without_lengths(given: object) -> object:
    if isinstance(given, dict):
        return {name: value for name, value in given.items() if name not in SCALES_WITH_RADIUS}
    return given


def _scatter(views: Sequence[View], attack: str, name: str) -> Picture:
    having = [view for view in views if attack in view.attacks and CLEAN in view.mean]

    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for view in having:
            style = run_style(view)
            for task, scores in view.scores.items():
                if attack in scores and CLEAN in scores:
                    pale = {**style, "alpha": 0.75 * style["alpha"], "s": 30, "linewidth": 0}
                    _point(axes, f"{view.label}, {task}", scores[CLEAN], scores[attack], **pale)
            style |= {"s": 130, "edgecolor": INK, "linewidth": 1.2, "zorder": 4}
            _point(axes, f"{view.label}, mean", view.mean[CLEAN], view.mean[attack], **style)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="clean accuracy, %", ylabel=f"under {attack}, %")
        axes.grid(axis="both")

    means = (f"{view.label}: mean {view.mean[CLEAN].text} % clean, {view.mean[attack].text} %" for view in having)
    picture = draw(name, f"Clean accuracy against accuracy under {attack}. {'; '.join(means)}", paint)
    return Picture(picture, f"clean against {attack}")


def interpolations(views: Sequence[View]) -> list[list[tuple[float, View]]]:
    """Groups the runs between the original and one fine-tuned model, each with its alpha and sorted by it."""
    lines: dict[str, list[tuple[float, View]]] = {}
    for view in views:
        if origin := view.part("model").get("interpolation"):
            lines.setdefault(str(origin["fine_tuned"]), []).append((float(origin["alpha"]), view))
    return [sorted(line, key=lambda point: point[0]) for line in lines.values() if len(line) > 1]


def _interpolation(line: Sequence[tuple[float, View]], name: str) -> Picture:
    alphas = [alpha for alpha, _ in line]
    kinds = union([view for _, view in line], of="mean")
    curves = {kind: [view.mean[kind] for _, view in line] for kind in kinds if all(kind in v.mean for _, v in line)}

    def paint(axes: Axes) -> None:
        for number, (kind, scores) in enumerate(curves.items()):
            style = {"color": run_colour(number), "marker": MARKERS[number % len(MARKERS)], "alpha": 1.0}
            _band(axes, alphas, scores, style | {"label": kind})
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set(xlabel="alpha: original 0, fine-tuned 1", ylabel="mean accuracy, %")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(frameon=False)

    described = (f"{kind}: {_described([*zip(alphas, scores, strict=True)])}" for kind, scores in curves.items())
    method = line[0][1].run.result["method"]
    return Picture(draw(name, f"Mean accuracy against alpha. {'; '.join(described)}", paint), str(method))


def _point(axes: Axes, name: str, clean: Score, robust: Score, **style: Any) -> None:
    title = f"{name}: {clean.text} % clean, {robust.text} % attacked"
    axes.scatter([100 * clean.value], [100 * robust.value], gid=title, clip_on=False, **style)
