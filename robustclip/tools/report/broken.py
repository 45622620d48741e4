"""Which member of an attack broke what, from the ledgers."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from robustclip.tools.report.html import disclosure, escape, figure, tag
from robustclip.tools.report.svg import MEMBER_COLOURS, PAPER, ROBUST, WRONG, draw, member_colour
from robustclip.tools.report.tables import Cell, Table
from robustclip.tools.report.tables import html as table_html
from robustclip.tools.report.view import CLEAN, View, union

WRONG_NAME, ROBUST_NAME = "wrong when clean", "robust"
ROOM_FOR_TEXT = 7.5  # percent of a bar that a number needs
ROW, FRAME = 0.34, 0.62  # inches


def section(views: Sequence[View]) -> str:
    """Stacked bars, an attack's runs or the only run's attacks beside each other, and their numbers."""
    members = list(dict.fromkeys(name for view in views for kind in view.attacks for name in view.members(kind)))
    attacks = [kind for kind in union(views, of="kinds") if kind != CLEAN]
    rows, numbers = [], []
    for place, attack in enumerate(attacks):
        having = [view for view in views if attack in view.attacks]
        names = [name for name in members if any(name in view.members(attack) for view in having)]
        rows.append([(attack, view, f"broken-{place}-{view.number}") for view in having])
        numbers.append(disclosure(f"Numbers of samples, {escape(attack)}", table_html(_counts(having, attack, names))))
    if len(views) == 1:
        pictures = [_bars(view, attack, members, name, attack) for row in rows for attack, view, name in row]
        return "".join([_legend(members), tag("div", *pictures, class_="pictures"), *numbers])
    parts = [_legend(members)]
    for attack, row, counts in zip(attacks, rows, numbers, strict=True):
        pictures = [_bars(view, attack, members, name, view.label) for attack, view, name in row]
        parts += [tag("h3", escape(attack)), tag("div", *pictures, class_="pictures"), counts]
    return "".join(parts)


def _bars(view: View, attack: str, members: Sequence[str], name: str, title: str) -> str:
    tasks = [task for task in view.scores if attack in view.broken[task]]
    kinds = [(CLEAN, WRONG), *((member, member_colour(place)) for place, member in enumerate(members)), ("", ROBUST)]

    def paint(axes: Axes) -> Mapping[str, str]:
        titles: dict[str, str] = {}
        for row, task in enumerate(tasks):
            counts, left = view.broken[task][attack], 0.0
            for kind, colour in kinds:
                width = 100 * counts[kind] / max(counts.total(), 1)
                if not width:
                    continue
                gid = f"bar{len(titles)}"
                titles[gid] = f"{task}: {_named(kind)} {counts[kind]} of {counts.total()}"
                axes.barh(row, width, left=left, color=colour, height=0.74, edgecolor=PAPER, linewidth=0.8, gid=gid)
                if width >= ROOM_FOR_TEXT:
                    _write(axes, left + width / 2, row, f"{width:.0f}", colour)
                left += width
        axes.set(xlim=(0, 100), ylim=(len(tasks) - 0.5, -0.5), xlabel="% of the samples")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return titles

    alt = "; ".join(f"{task}: {_said(view, task, attack)}" for task in tasks)
    picture = draw(name, f"What broke each task under {attack}, {view.label}. {alt}", paint, size=_size(len(tasks)))
    return figure(picture, tag("b", escape(title)))


def _size(rows: int) -> tuple[float, float]:
    return 5.0, FRAME + ROW * max(rows, 1)


def _write(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    is_dark = colour == member_colour(MEMBER_COLOURS - 1)
    axes.text(x, y, text, ha="center", va="center_baseline", color="#ffffff" if is_dark else "#000000", fontsize=10)


def _counts(views: Sequence[View], attack: str, members: Sequence[str]) -> Table:
    kinds = [CLEAN, *members, ""]
    rows = []
    for view in views:
        for task in (task for task in view.scores if attack in view.broken[task]):
            counts = view.broken[task][attack]
            name = task if len(views) == 1 else f"{view.label}: {task}"
            rows.append((name, [Cell(str(number)) for number in [*(counts[kind] for kind in kinds), counts.total()]]))
    return Table(f"What broke the samples under {attack}", "task", [*map(_named, kinds), "samples"], rows)


def _said(view: View, task: str, attack: str) -> str:
    return ", ".join(f"{_named(kind)} {count}" for kind, count in sorted(view.broken[task][attack].items()))


def _named(kind: str) -> str:
    return {CLEAN: WRONG_NAME, "": ROBUST_NAME}.get(kind, kind)


def _legend(members: Sequence[str]) -> str:
    entries = [
        ("wrong", WRONG_NAME),
        *((f"member{n % MEMBER_COLOURS}", f"broken by {m}") for n, m in enumerate(members)),
    ]
    items = [
        tag("li", tag("span", class_=f"swatch {style}", aria_hidden="true"), escape(text))
        for style, text in [*entries, ("robust", ROBUST_NAME)]
    ]
    return tag("ul", *items, class_="legend", aria_label="Colours of the bars")
