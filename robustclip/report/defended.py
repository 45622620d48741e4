"""Shows methods with a test-time defence: undefended, static and adaptive accuracy, and the way that succeeded."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from robustclip.report.blocks import Block, Cell, Picture, Pictures, Table, Text
from robustclip.report.section import Section
from robustclip.report.svg import draw, run_colour, run_entry
from robustclip.report.view import CLEAN, LEVEL, MEAN, MISSING, View, percent
from robustclip.results.tables import ADAPTIVE, COLUMNS, STATIC, SUCCESS, UNDEFENDED

TEXT = (
    "The adaptive column is the accuracy under attack. Undefended: the attack on the same weights without the defence. "
    "Static: the defended method on those attacked images, as if the attacker did not know the defence; this is no "
    "robustness. Adaptive: the worst case over all ways of attacking through the defence, which is an upper bound too."
)


class Defended(Section):
    """Accuracy of methods with a test-time defence, without it, under replayed images and under all ways."""

    title = "Test-time defences"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns tables and slopes of the runs with a defence, or nothing if there are none."""
        pairs = [
            (view, attack)
            for view in views
            if view.part("model").get("defence") is not None
            for attack in view.attacks
            if SUCCESS not in view.part(MEAN)[attack]
        ]
        tables = [table for view, attack in pairs for table in (_columns(view, attack), _ways(view, attack))]
        pictures = [_slopes(view, attack, f"slope-{view.number}-{n}") for n, (view, attack) in enumerate(pairs)]
        return [Text(TEXT), *tables, Pictures(pictures)] if pairs else []


def _columns(view: View, attack: str) -> Table:
    rows = [(task, [*_accuracies(values, attack), _cost(values)]) for task, values in view.part("tasks").items()]
    rows.append((MEAN, [*_accuracies(view.part(MEAN), attack), Cell("")]))
    head = ["undefended, clean", "defended, clean", *(f"{column}, {attack}" for column in COLUMNS), "cost"]
    caption = f"{view.label} with {view.part('model')['defence']['class']} under {attack}, percent and {LEVEL} interval"
    return Table(f"{caption}; cost is a defended answer's time in undefended ones", "task", head, rows, has_total=True)


def _accuracies(values: Mapping[str, Any], attack: str) -> list[Cell]:
    clean = values[CLEAN]
    return [_cell(part) for part in (clean.get(UNDEFENDED), clean, *(values[attack].get(c) for c in COLUMNS))]


def _ways(view: View, attack: str) -> Table:
    counts = {task: values[attack]["by_way"] for task, values in view.part("tasks").items()}
    names = list(dict.fromkeys(name for of_task in counts.values() for name in of_task))
    rows = [(task, [Cell(str(of_task.get(name, 0))) for name in names]) for task, of_task in counts.items()]
    return Table(f"{view.label} under {attack}: samples by the way that misclassified them first", "task", names, rows)


def _slopes(view: View, attack: str, name: str) -> Picture:
    """Draws a line per task from its static to its adaptive accuracy."""
    tasks = view.part("tasks").items()
    lines = {task: [100 * values[attack][c]["acc1"] for c in (STATIC, ADAPTIVE)] for task, values in tasks}

    def paint(axes: Axes) -> None:
        for task, ends in lines.items():
            tooltip = f"{task}: {ends[0]:.1f} static, {ends[1]:.1f} adaptive"
            axes.plot([0, 1], ends, marker="o", color=run_colour(view.number), alpha=0.7, gid=tooltip)
        axes.set_xticks([0, 1], [STATIC, ADAPTIVE])
        axes.set(xlim=(-0.2, 1.2), ylim=(-2, 102), ylabel="accuracy in percent")
        axes.grid(axis="y")

    alt = "; ".join(f"{task}: {static:.1f} to {adaptive:.1f}" for task, (static, adaptive) in lines.items())
    picture = draw(name, f"Static and adaptive accuracy of {view.label} under {attack}. {alt}", paint, size=(3.4, 3.4))
    return Picture(picture, f"{view.label}, {attack}: static to adaptive", run_entry(view))


def _cell(accuracy: Mapping[str, Any] | None) -> Cell:
    if accuracy is None:
        return Cell(MISSING)
    low, high = accuracy["interval"]
    return Cell(percent(accuracy["acc1"]), f"{percent(low)} to {percent(high)}")


def _cost(values: Mapping[str, Any]) -> Cell:
    return Cell(MISSING if values.get("cost") is None else f"{values['cost']:.1f}")
