"""Shows how many samples each member of an attack misclassified, from the ledgers."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from robustclip.report.blocks import Block, Cell, Entry, Fold, Heading, Legend, Picture, Pictures, Table, Text
from robustclip.report.section import Section
from robustclip.report.svg import MEMBER_COLOURS, PAPER, ROBUST, WRONG, draw, member_colour, run_entry
from robustclip.report.view import CLEAN, View, percent, union
from robustclip.results.tables import SUCCESS

CLEAN_NAME, ROBUST_NAME = "misclassified without attack", "robust"
ROOM_FOR_TEXT = 7.5  # percent of a bar that a number needs
ROW, FRAME = 0.34, 0.62  # inches


class Misclassified(Section):
    """Success of each member of an attack."""

    title = "Which member succeeded"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns stacked bars of every attack and their numbers, or nothing if no run has an attack."""
        attacks = union(views, of="attacks")
        if not attacks:
            return []
        members = list(dict.fromkeys(name for view in views for kind in view.attacks for name in view.members(kind)))
        text = "Each sample counts once, for the first member of the attack that misclassified it, in legend order."
        blocks: list[Block] = [Text(text), _legend(members)]
        for place, attack in enumerate(attacks):
            having = [view for view in views if attack in view.attacks]
            if any(SUCCESS in view.part("mean").get(attack, {}) for view in having):
                blocks += [Heading(attack), _moved(having, attack)]
                continue
            names = [name for name in members if any(name in view.members(attack) for view in having)]
            bars = [_bars(view, attack, members, f"members-{place}-{view.number}") for view in having]
            fold = Fold(f"Numbers of samples, {attack}", [_counts(having, attack, names)])
            blocks += [Heading(attack), Pictures(bars), fold]
        return blocks


def _bars(view: View, attack: str, members: Sequence[str], name: str) -> Picture:
    tasks = [task for task in view.scores if attack in view.successes[task]]
    kinds = [(CLEAN, WRONG), *((member, member_colour(place)) for place, member in enumerate(members)), ("", ROBUST)]

    def paint(axes: Axes) -> None:
        for row, task in enumerate(tasks):
            counts, left = view.successes[task][attack], 0.0
            for kind, colour in kinds:
                width = 100 * counts[kind] / max(counts.total(), 1)
                if not width:
                    continue
                title = f"{task}: {_named(kind)} {counts[kind]} of {counts.total()}"
                axes.barh(row, width, left=left, color=colour, height=0.74, edgecolor=PAPER, linewidth=0.8, gid=title)
                if width >= ROOM_FOR_TEXT:
                    ink = "#ffffff" if colour == member_colour(MEMBER_COLOURS - 1) else "#000000"
                    at = left + width / 2, row
                    axes.text(*at, f"{width:.0f}", ha="center", va="center_baseline", color=ink, fontsize=10)
                left += width
        axes.set(xlim=(0, 100), ylim=(len(tasks) - 0.5, -0.5), xlabel="% of the samples")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    alt = "; ".join(f"{task}: {_spoken(view, task, attack)}" for task in tasks)
    size = (5.0, FRAME + ROW * max(len(tasks), 1))
    picture = draw(name, f"Successes of each member of {attack}, {view.label}. {alt}", paint, size=size)
    return Picture(picture, view.label, run_entry(view))


def _counts(views: Sequence[View], attack: str, members: Sequence[str]) -> Table:
    kinds = [CLEAN, *members, ""]
    rows = []
    for view in views:
        for task in (task for task in view.scores if attack in view.successes[task]):
            counts = view.successes[task][attack]
            name = task if len(views) == 1 else f"{view.label}: {task}"
            rows.append((name, [Cell(str(number)) for number in [*(counts[kind] for kind in kinds), counts.total()]]))
    return Table(f"Successes of the members of {attack}", "task", [*map(_named, kinds), "samples"], rows)


def _moved(views: Sequence[View], attack: str) -> Table:
    """Tabulates the images that an attack with a target class moves to it."""
    rows = []
    for view in views:
        for task, values in view.part("tasks").items():
            success = values.get(attack, {}).get(SUCCESS)
            if success is None:
                continue
            name = task if len(views) == 1 else f"{view.label}: {task}"
            limits = " to ".join(map(percent, success["interval"]))
            numbers = [
                f"{percent(success['rate'])} ({limits})",
                *(str(success[key]) for key in ("count", "n", "left_out")),
            ]
            target = view.axes(task, attack).get("steps", {})
            names = {str(member.get("target")) for member in target.values()}
            rows.append((name, [Cell(value) for value in [", ".join(sorted(names)), *numbers]]))
    columns = ["target class", "moved there, percent", "moved", "images of other classes", "images of the target class"]
    return Table(f"Images that {attack} moves to its target class", "task", columns, rows)


def _spoken(view: View, task: str, attack: str) -> str:
    return ", ".join(f"{_named(kind)} {count}" for kind, count in sorted(view.successes[task][attack].items()))


def _named(kind: str) -> str:
    return {CLEAN: CLEAN_NAME, "": ROBUST_NAME}.get(kind, kind)


def _legend(members: Sequence[str]) -> Legend:
    entries = [("wrong", CLEAN_NAME), *((f"member{n % MEMBER_COLOURS}", m) for n, m in enumerate(members))]
    return Legend("Colours of the bars", [Entry(f"swatch {s}", "", t) for s, t in [*entries, ("robust", ROBUST_NAME)]])
