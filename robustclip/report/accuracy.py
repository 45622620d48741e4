"""Shows the accuracy of every run: summary on the first screen, tables, and warnings about unlike protocols."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import product

from robustclip.intervals import Difference
from robustclip.names import csv_cell
from robustclip.report.blocks import Block, Cell, Notice, Table, Tables, Text
from robustclip.report.section import Section
from robustclip.report.view import CLEAN, LEVEL, MEAN, MISSING, Score, View, union
from robustclip.results.protocol import differences, with_counts
from robustclip.tools.compare import Comparisons, by_id, pair, unchecked_images, unlike_unknown

UNITS = f"Top-1 accuracy in percent, each with its {LEVEL} interval."
BEST_RULE = (
    f"▲ marks the best run: the {LEVEL} interval of its paired difference from every other run lies above 0. Runs "
    "whose audit failed are never marked, and runs of unlike protocols are not compared."
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
    kinds, pairs = union(views, of="mean"), _Pairs()
    columns = [[Cell(view.grade) for view in views], *(_marked(views, MEAN, kind, pairs) for kind in kinds)]
    rows = list(zip((view.label for view in views), zip(*columns, strict=True), strict=True))
    table = Table("Mean accuracy over the tasks", "run", ["audit grade", *kinds], rows)
    lines = [Text(line) for line in [*_findings(views, pairs), *_grades(views)]]
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


class _Pairs:
    """Compares runs in pairs, each pair once."""

    def __init__(self) -> None:
        self._comparisons: dict[tuple[int, int], Comparisons | str] = {}

    def difference(self, best: View, other: View, name: str, kind: str) -> Difference | str:
        """Returns how much better a run is on a task or mean than another, or the reason why this is not known."""
        key = (best.number, other.number)
        if key not in self._comparisons:
            try:
                self._comparisons[key] = pair(other.run, best.run)
            except ValueError as error:
                self._comparisons[key] = str(error)
        compared = self._comparisons[key]
        if isinstance(compared, str):
            return compared
        if best.averaged(name) != other.averaged(name):
            return f"their {name} is over different tasks"
        numbers = {(row.task, row.attack): row.difference for row in compared.rows}
        numbers |= {(mean.name, mean.attack): mean.difference for mean in compared.means}
        return numbers[name, kind]


def _ranked(views: Sequence[View], name: str, kind: str) -> list[View]:
    """Lists the runs that have a number and whose audit did not fail, the highest number first."""
    sound = [view for view in views if not view.has_failed and kind in view.named.get(name, {})]
    return sorted(sound, key=lambda view: view.named[name][kind].value, reverse=True)


def _undecided(ranked: Sequence[View], name: str, kind: str, pairs: _Pairs) -> str:
    """Writes why the first of the ranked runs is not better than each of the others; empty if it is."""
    best, *others = ranked
    for other in others:
        difference = pairs.difference(best, other, name, kind)
        if isinstance(difference, str):
            return f"{best.name} and {other.name} cannot be compared: {difference}"
        if difference.low <= 0:
            return f"{best.name} differs from {other.name} by {_in_words(difference)}"
    return ""


def _in_words(difference: Difference) -> str:
    points, low, high = (f"{100 * value:+.1f}" for value in difference)
    return f"{points} points, {LEVEL} interval of the paired difference {low} to {high}"


def _findings(views: Sequence[View], pairs: _Pairs) -> list[str]:
    """Writes one sentence per attack: the best run and its paired difference from the second, or why no run is best."""
    lines = []
    for kind in union(views, of="mean"):
        ranked = _ranked(views, MEAN, kind)
        if len(ranked) < 2:
            continue
        condition = "Without attack" if kind == CLEAN else f"Under {kind}"
        first, second = ranked[:2]
        reason, difference = _undecided(ranked, MEAN, kind, pairs), pairs.difference(first, second, MEAN, kind)
        if reason or isinstance(difference, str):
            lines.append(f"{condition}: no run is best: {reason}.")
        else:
            lines.append(f"{condition}: {first.name} is best, {_in_words(difference)}, compared with {second.name}.")
    return lines


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
    names, pairs = [*union(views, of="scores"), *union(views, of="averages"), MEAN], _Pairs()
    tables = []
    for kind in union(views, of="mean"):
        caption = "Clean accuracy" if kind == CLEAN else f"Accuracy under {kind}"
        rows = [(name, _marked(views, name, kind, pairs)) for name in names]
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


def _marked(views: Sequence[View], name: str, kind: str, pairs: _Pairs) -> list[Cell]:
    """Returns a cell per run for a task, an average or the mean, and marks the best by `BEST_RULE`."""
    cells, ranked = [_cell(view.named.get(name, {}).get(kind)) for view in views], _ranked(views, name, kind)
    if len(ranked) > 1 and not _undecided(ranked, name, kind, pairs):
        place = views.index(ranked[0])
        cells[place] = cells[place]._replace(is_best=True)
    return cells


def _cell(score: Score | None) -> Cell:
    return Cell(MISSING) if score is None else Cell(score.text, score.interval)


def _seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _joined(numbers: Sequence[int]) -> str:
    return " / ".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


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
