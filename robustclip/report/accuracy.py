"""Shows the accuracy of every run: summary on the first screen, tables, and warnings about unlike protocols."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import product

from robustclip.names import csv_cell
from robustclip.report.blocks import Block, Cell, Notice, Table, Tables, Text
from robustclip.report.section import Section
from robustclip.report.view import CLEAN, LEVEL, MEAN, MISSING, Score, View, union
from robustclip.results.protocol import differences, with_counts
from robustclip.tools.compare import by_id, pair, unchecked_images, unlike_unknown

UNITS = f"Top-1 accuracy in percent, each with its {LEVEL} interval."
BEST_RULE = (
    f"▲ marks the best run only where its {LEVEL} interval lies above those of all other runs, all were measured under "
    "one protocol, and its audit did not fail."
)
GRADES = {
    "A": "all checks passed",
    "B": "something was not measured",
    "C": "a check raised a warning",
    "F": "a check failed, so that its accuracy under attack is no evidence of robustness",
}
PLACES_LISTED = 6


def summary(views: Sequence[View]) -> list[Block]:
    """Summarises which run is better, by how much, and whether its audit passed."""
    kinds = union(views, of="mean")
    columns = [[Cell(view.grade) for view in views], *(_marked(views, MEAN, kind) for kind in kinds)]
    rows = list(zip((view.label for view in views), zip(*columns, strict=True), strict=True))
    table = Table("Mean accuracy over the tasks", "run", ["audit grade", *kinds], rows)
    lines = [Text(line) for line in [*_findings(views), *_grades(views)]]
    return [table, Text(f"{UNITS} {BEST_RULE}" if len(views) > 1 else UNITS, "aside"), *lines]


class Accuracy(Section):
    """Accuracy of every task, with warnings where runs must not be compared."""

    title = "Accuracy"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns warnings, one table per attack, and the notes of the tests."""
        notes: dict[str, list[str]] = {}
        for view in views:
            for note in view.run.result.get("notes") or []:
                notes.setdefault(str(note), []).append(view.label)
        owners = {note: "" if len(runs) == len(views) else f"{', '.join(runs)}: " for note, runs in notes.items()}
        notice = Notice("Notes of the test", "", [(f"{owner}{note}", "") for note, owner in owners.items()])
        return [*_warnings(views), Tables(_tables(views)), *([notice] if notes else [])]


def warning_lines(views: Sequence[View]) -> list[str]:
    """Returns the warnings of `Accuracy` as plain lines, for Markdown."""
    different = [f"UNLIKE PROTOCOLS, do not compare: {line} {places}" for line, places in _unlike(views)]
    return [*different, *_gaps(views), *_unchecked(views)]


def csv_of(views: Sequence[View]) -> str:
    """Returns every accuracy as a line of CSV, in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["run", "method", "grade", "task", "attack", "n", "correct", "percent", "low", "high", "task_seconds"]
    writer.writerow(head)
    for view in views:
        own = [csv_cell(view.run.name), csv_cell(view.run.result["method"]), view.grade]
        for name, scores in view.named.items():
            task = view.part("tasks").get(name, {})
            times = [_seconds(task.get("seconds"))] if task else [""]
            for kind, score in scores.items():
                counts = [task.get("n"), score.correct]
                writer.writerow([*own, csv_cell(name), csv_cell(kind), *counts, *score.limits, *times])
    return text.getvalue()


def _findings(views: Sequence[View]) -> list[str]:
    """Writes one sentence per attack: the best run and its paired difference from the second, or why no run is best."""
    sound = [view for view in views if not view.has_failed]
    lines = []
    for kind in union(views, of="mean") if len(views) > 1 else ():
        having = [view for view in sound if kind in view.mean]
        ranked = sorted(having, key=lambda view: view.mean[kind].value, reverse=True)
        if len(ranked) > 1:
            condition = "Without attack" if kind == CLEAN else f"Under {kind}"
            lines.append(f"{condition}: {_difference(ranked[0], ranked[1], kind)}")
    return lines


def _difference(best: View, second: View, kind: str) -> str:
    try:
        means = pair(second.run, best.run).means
    except ValueError as error:
        return f"{best.name} and {second.name} cannot be compared: {error}"
    difference = next(mean.difference for mean in means if (mean.name, mean.attack) == (MEAN, kind))
    points, low, high = (f"{100 * value:+.1f}" for value in difference)
    interval = f"points, {LEVEL} interval of the paired difference {low} to {high}"
    if difference.low > 0:
        return f"{best.name} is best, {points} {interval}, compared with {second.name}."
    return f"no run is best: {best.name} differs from {second.name} by {points} {interval}."


def _grades(views: Sequence[View]) -> list[str]:
    """Explains each grade, and names the failed checks."""
    lines = []
    for grade, meaning in GRADES.items():
        names = [view.name for view in views if view.grade == grade]
        if names:
            lines.append(f"Audit grade {grade} ({', '.join(names)}): {meaning}.")
    for view in views:
        failed = [f"{c.get('name')}: {c.get('found')}" for c in view.checks if c.get("status") == "fail"]
        lines += [f"{view.name} failed {'; '.join(failed)}"] if failed else []
    return lines


def _tables(views: Sequence[View]) -> list[Table]:
    """Returns a table of all tasks for one run, or a table per attack for several; samples and seconds come last."""
    if len(views) == 1:
        (view,) = views
        rows = [(name, [_cell(scores.get(kind)) for kind in view.mean]) for name, scores in view.named.items()]
        return [Table("Accuracy of every task", "task", list(view.mean), rows, has_total=True), _effort(views)]
    names = [*union(views, of="scores"), *union(views, of="averages"), MEAN]
    tables = []
    for kind in union(views, of="mean"):
        caption = "Clean accuracy" if kind == CLEAN else f"Accuracy under {kind}"
        rows = [(name, _marked(views, name, kind)) for name in names]
        tables.append(Table(caption, "task", [view.label for view in views], rows, has_total=True))
    return [*tables, _effort(views)]


def _effort(views: Sequence[View]) -> Table:
    """Counts samples and seconds; numbers that differ between runs are joined in the order of the runs."""
    results = {task: [view.part("tasks").get(task, {}) for view in views] for task in union(views, of="scores")}
    has_bad = any(values.get("bad_samples") for of_task in results.values() for values in of_task)
    rows = []
    for task, of_task in results.items():
        numbers = [_joined([values["n"] for values in of_task if values])]
        numbers += [_joined([values.get("bad_samples", 0) for values in of_task if values])] if has_bad else []
        rows.append((task, [Cell(text) for text in [*numbers, *(_seconds(v.get("seconds")) for v in of_task)]]))
    columns = ["n", *(["left out"] if has_bad else []), *(f"{view.label}, seconds" for view in views)]
    return Table("Samples and seconds", "task", columns, rows)


def _marked(views: Sequence[View], name: str, kind: str) -> list[Cell]:
    """Returns a cell per run for a task, an average or the mean, and marks the best where `BEST_RULE` allows it."""
    scores = [view.named.get(name, {}).get(kind) for view in views]
    cells = [_cell(score) for score in scores]
    present = [(score, place) for place, score in enumerate(scores) if score is not None]
    sound = [item for item in present if not views[item[1]].has_failed]
    if len(present) > 1 and sound and _is_fair(views, name, kind):
        best, place = max(sound, key=lambda item: item[0].value)
        is_best = all(best.low > score.high for score, other in sound if other != place)
        cells[place] = cells[place]._replace(is_best=is_best)
    return cells


def _cell(score: Score | None) -> Cell:
    return Cell(MISSING) if score is None else Cell(score.text, score.interval)


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _joined(numbers: Sequence[int]) -> str:
    return " / ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _is_fair(views: Sequence[View], name: str, kind: str) -> bool:
    """Reports whether all runs measured a number under one protocol, and an average or mean over equal tasks."""
    if name in union(views, of="scores"):
        having = _having(views, name, kind)
        return not any(differences(having[0].axes(name, kind), view.axes(name, kind)) for view in having[1:])
    tasks = views[0].averaged(name)
    return all(view.averaged(name) == tasks for view in views) and all(_is_fair(views, task, kind) for task in tasks)


def _having(views: Sequence[View], task: str, kind: str) -> list[View]:
    return [view for view in views if kind in view.scores.get(task, {})]


def _warnings(views: Sequence[View]) -> list[Notice]:
    gaps, unchecked = ([(line, "") for line in lines] for lines in (_gaps(views), _unchecked(views)))
    unlike = "These runs were measured under different protocols. The numbers named here must not be compared."
    missing = "Not every run has every task and attack, and a mean is over the tasks that its run has."
    images = "These runs may have seen different images. Run `robustclip test` again."
    notices = [
        Notice("Unlike protocols", unlike, _unlike(views), is_bad=True),
        Notice("Not in every run", missing, gaps),
        Notice("Images not compared", images, unchecked),
    ]
    return [notice for notice in notices if notice.lines]


def _unlike(views: Sequence[View]) -> list[tuple[str, str]]:
    """Lists each difference between the protocols of two runs in one line, with the numbers that it concerns."""
    by_line: dict[str, dict[str, list[str]]] = {}
    for task, kind in product(union(views, of="scores"), union(views, of="mean")):
        first, *others = _having(views, task, kind) or views[:1]
        for view in others:
            lines = differences(first.axes(task, kind), view.axes(task, kind))
            is_counted = any(line.startswith("pixels:") for line in lines)
            rows = (by_id(first.run, task), by_id(view.run, task)) if is_counted else ({}, {})
            for line in with_counts(lines, *rows):
                places = by_line.setdefault(f"{first.name} and {view.name} differ in {line}", {})
                places.setdefault(task, []).append(kind)
    return [(line, _places(places, views)) for line, places in by_line.items()]


def _gaps(views: Sequence[View]) -> list[str]:
    """Lists tasks and attacks that only some of the runs have."""
    having = {f"task {task}": [v.name for v in views if task in v.scores] for task in union(views, of="scores")}
    having |= {f"attack {kind}": [v.name for v in views if kind in v.mean] for kind in union(views, of="mean")}
    return [f"{name} is only in {', '.join(runs)}" for name, runs in having.items() if len(runs) < len(views)]


def _unchecked(views: Sequence[View]) -> list[str]:
    """Lists images of the first run that another run did not record, or recorded differently for unknown classes."""
    first, *others = (view.run for view in views)
    return [line for run in others for line in (*unchecked_images(first, run), *unlike_unknown(first, run))]


def _places(places: Mapping[str, Sequence[str]], views: Sequence[View]) -> str:
    kinds, tasks = union(views, of="mean"), union(views, of="scores")
    if all(list(places.get(task, ())) == kinds for task in tasks):
        return "(all tasks)"
    named = [task if list(of) == kinds else f"{task} {', '.join(of)}" for task, of in places.items()]
    more = f"; and {len(named) - PLACES_LISTED} more tasks" if len(named) > PLACES_LISTED else ""
    return f"({'; '.join(named[:PLACES_LISTED])}{more})"
