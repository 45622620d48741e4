"""The accuracies as tables, in HTML, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from robustclip.names import csv_cell, markdown
from robustclip.tools.report.html import LEVEL, escape, tag
from robustclip.tools.report.unlike import is_alike, said
from robustclip.tools.report.view import CLEAN, MISSING, Score, View, averaged, union

UNITS = f"Top-1 accuracy in percent, each with its {LEVEL} interval."
BEST_RULE = (
    f"Bold and ▲ mark the best run of a row, only where its {LEVEL} interval lies above those of all other runs "
    "and all were measured under the same protocol. That is cautious: "
    "robustclip compare tests the same samples in pairs and tells smaller differences."
)
MEAN = "mean"


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Args:
        text: the number.
        note: stands below it, smaller.
        is_best: of its row.
    """

    text: str
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a heading each.

    Args:
        caption: what is shown.
        corner: heading of the first column.
        columns: headings of the others.
        rows: name and cells.
        last: whether the last row sums up the others.
    """

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]] = field(default_factory=list)
    last: bool = False


def accuracy_tables(views: Sequence[View]) -> list[Table]:
    """Every task of one run; of several, the means, a table per attack, and what it took."""
    if len(views) == 1:
        return [_one_run(views[0])]
    kinds = union(views, of="kinds")
    means = [(view.label, [_cell(view.mean.get(kind)) for kind in kinds]) for view in views]
    first = Table("Mean over the tasks", "run", kinds, means)
    return [first, *(_side_by_side(views, kind) for kind in kinds), _effort(views)]


def html(table: Table) -> str:
    """As an element that scrolls by itself where it is wider than the page."""
    head = tag("tr", tag("th", escape(table.corner), scope="col"), *(_head(name) for name in table.columns))
    lines = [
        tag("tr", tag("th", escape(name), scope="row"), *(_data(cell) for cell in cells)) for name, cells in table.rows
    ]
    foot = [tag("tfoot", lines.pop())] if table.last else []
    body = tag("table", tag("caption", escape(table.caption)), tag("thead", head), tag("tbody", *lines), *foot)
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label=table.caption)


def document(views: Sequence[View], more: Sequence[Table] = ()) -> str:
    """The tables as Markdown, with more tables behind them."""
    parts = [f"# Robustness report\n\n{UNITS}\n"]
    parts += [f"{BEST_RULE}\n"] if len(views) > 1 else []
    parts += [f"{markdown(line)}\n" for line in said(views)]
    for table in [*accuracy_tables(views), *more]:
        head = [markdown(name) for name in (table.corner, *table.columns)]
        lines = [head, ["---", *["--:"] * len(table.columns)]]
        lines += [[markdown(name), *(_inline(cell) for cell in cells)] for name, cells in table.rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"## {markdown(table.caption)}\n\n{text}")
    return "\n".join(parts)


def listing(views: Sequence[View]) -> str:
    """Every accuracy as a line of CSV, in percent as in the other tables."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "method", "task", "attack", "n", "correct", "percent", "low", "high", "task_seconds"])
    for view in views:
        head = [csv_cell(name) for name in (view.run.name, view.run.result["method"])]
        for task, scores in view.scores.items():
            values = view.task(task)
            for kind, score in scores.items():
                seconds = _seconds(values.get("seconds"))
                writer.writerow(
                    [*head, csv_cell(task), csv_cell(kind), values["n"], score.correct, *_limits(score), seconds]
                )
        for name, means in [*view.averages.items(), (MEAN, view.mean)]:
            for kind, score in means.items():
                writer.writerow([*head, csv_cell(name), csv_cell(kind), "", "", *_limits(score), ""])
    return text.getvalue()


def _one_run(view: View) -> Table:
    has_bad = any(view.task(task).get("bad_samples") for task in view.scores)
    rows = [
        (task, [*(_cell(scores.get(kind)) for kind in view.kinds), *_work(view, task, has_bad)])
        for task, scores in view.scores.items()
    ]
    nothing = [Cell("")] * (3 if has_bad else 2)
    rows += [(name, [*(_cell(means[kind]) for kind in view.kinds), *nothing]) for name, means in view.averages.items()]
    rows.append((MEAN, [*(_cell(view.mean[kind]) for kind in view.kinds), *_total(view, has_bad)]))
    columns = [*view.kinds, "n", "seconds", *(["left out"] if has_bad else [])]
    return Table("Accuracy of every task", "task", columns, rows, last=True)


def _side_by_side(views: Sequence[View], kind: str) -> Table:
    tasks = union(views, of="tasks")
    rows = []
    for task in tasks:
        scores = [view.scores.get(task, {}).get(kind) for view in views]
        rows.append((task, _marked(scores, is_alike(views, task, kind))))
    for name in union(views, of="averages"):
        scores = [view.averages.get(name, {}).get(kind) for view in views]
        over = averaged(next(view for view in views if name in view.averages), name)
        is_same = all(averaged(view, name) == over for view in views)
        rows.append((name, _marked(scores, is_same and all(is_alike(views, task, kind) for task in over))))
    same_tasks = all(set(view.scores) == set(tasks) for view in views)
    is_fair = same_tasks and all(is_alike(views, task, kind) for task in tasks)
    rows.append((MEAN, _marked([view.mean.get(kind) for view in views], is_fair)))
    what = "Clean accuracy" if kind == CLEAN else f"Accuracy under {kind}"
    return Table(what, "task", [view.label for view in views], rows, last=True)


def _effort(views: Sequence[View]) -> Table:
    """Samples and seconds; numbers on which the runs differ stand beside each other, in the order of the runs."""
    tasks = union(views, of="tasks")
    having = {task: [view.task(task) for view in views if task in view.scores] for task in tasks}
    has_bad = any(values.get("bad_samples") for found in having.values() for values in found)
    rows = []
    for task, found in having.items():
        numbers = [_joined([values["n"] for values in found])]
        numbers += [_joined([values.get("bad_samples", 0) for values in found])] if has_bad else []
        times = [_seconds(view.task(task).get("seconds") if task in view.scores else None) for view in views]
        rows.append((task, [Cell(text) for text in [*numbers, *times]]))
    columns = ["n", *(["left out"] if has_bad else []), *(f"{view.label}, seconds" for view in views)]
    return Table("Samples and seconds", "task", columns, rows)


def _marked(scores: Sequence[Score | None], is_fair: bool) -> list[Cell]:
    """Cells of one row; the best is marked if its interval lies above all others."""
    cells = [_cell(score) for score in scores]
    present = [(score, place) for place, score in enumerate(scores) if score is not None]
    if not is_fair or len(present) < 2:
        return cells
    best, place = max(present, key=lambda item: item[0].value)
    if all(best.low > score.high for score, other in present if other != place):
        cells[place] = Cell(best.text, best.interval, is_best=True)
    return cells


def _cell(score: Score | None) -> Cell:
    return Cell(MISSING) if score is None else Cell(score.text, score.interval)


def _work(view: View, task: str, has_bad: bool) -> list[Cell]:
    values = view.task(task)
    left_out = [Cell(str(values.get("bad_samples", 0)))] if has_bad else []
    return [Cell(str(values["n"])), Cell(_seconds(values.get("seconds"))), *left_out]


def _total(view: View, has_bad: bool) -> list[Cell]:
    values = [view.task(task) for task in view.scores]
    numbers = [str(sum(each["n"] for each in values)), _seconds(sum(each.get("seconds") or 0 for each in values))]
    bad = [str(sum(each.get("bad_samples", 0) for each in values))] if has_bad else []
    return [Cell(text) for text in [*numbers, *bad]]


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _joined(numbers: Sequence[int]) -> str:
    return " / ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _limits(score: Score) -> list[str]:
    return [score.text, *score.interval.split(" to ")]


def _head(name: str) -> str:
    return tag("th", escape(name), scope="col")


def _data(cell: Cell) -> str:
    number = tag("strong", escape(cell.text), tag("abbr", "▲", title="best")) if cell.is_best else escape(cell.text)
    return tag("td", number, tag("small", escape(cell.note)) if cell.note else "")


def _inline(cell: Cell) -> str:
    number = f"**{markdown(cell.text)}** ▲" if cell.is_best else markdown(cell.text)
    return f"{number} ({markdown(cell.note)})" if cell.note else number
