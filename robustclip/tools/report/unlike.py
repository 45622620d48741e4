"""Where the runs' protocols differ, so that their numbers must not be compared."""

from collections.abc import Mapping, Sequence

from robustclip.protocol import differences, with_counts
from robustclip.tools.compare import by_id, unchecked_images, unlike_unknown
from robustclip.tools.report.html import escape, tag
from robustclip.tools.report.view import View, union

LISTED = 6  # places that are named one by one


def is_alike(views: Sequence[View], task: str, kind: str) -> bool:
    """Whether all runs that have a number measured it under one protocol."""
    having = [view for view in views if kind in view.scores.get(task, {})]
    return all(not differences(having[0].axes(task, kind), view.axes(task, kind)) for view in having[1:])


def unlike(views: Sequence[View]) -> list[tuple[str, str]]:
    """Each difference between two runs' protocols in one line, and which numbers it concerns."""
    found: dict[str, dict[str, list[str]]] = {}
    for task in union(views, of="tasks"):
        for kind in union(views, of="kinds"):
            having = [view for view in views if kind in view.scores.get(task, {})]
            for view in having[1:]:
                lines = differences(having[0].axes(task, kind), view.axes(task, kind))
                rows = (
                    (by_id(having[0].run, task), by_id(view.run, task))
                    if any(line.startswith("pixels:") for line in lines)
                    else ({}, {})
                )
                for line in with_counts(lines, *rows):
                    places = found.setdefault(f"{having[0].label} and {view.label} differ in {line}", {})
                    places.setdefault(task, []).append(kind)
    return [(line, _places(places, views)) for line, places in found.items()]


def gaps(views: Sequence[View]) -> list[str]:
    """What only some of the runs have."""
    lines = []
    for what, singular in (("tasks", "task"), ("kinds", "attack")):
        for name in union(views, of=what):
            having = [view.label for view in views if name in (view.scores if what == "tasks" else view.kinds)]
            if len(having) < len(views):
                lines.append(f"{singular} {name} is only in {', '.join(having)}")
    return lines


def doubts(views: Sequence[View]) -> list[str]:
    """What cannot be trusted: unlike images of unknown classes, unchecked images, a ledger against its result."""
    runs = [view.run for view in views]
    lines = [line for run in runs[1:] for line in (*unchecked_images(runs[0], run), *unlike_unknown(runs[0], run))]
    for view in views:
        for task, kinds in view.broken.items():
            for kind, counts in kinds.items():
                said = view.scores[task][kind].correct
                if said is not None and counts[""] != said:
                    lines.append(
                        f"{view.label}, {task} under {kind}: the ledger has {counts['']} right, the result {said}"
                    )
    return lines


def said(views: Sequence[View]) -> list[str]:
    """All of this in plain lines."""
    different = [f"UNLIKE PROTOCOLS, do not compare: {line} {places}" for line, places in unlike(views)]
    return [*different, *gaps(views), *doubts(views)]


def warnings(views: Sequence[View]) -> str:
    """The differences as a notice above the tables; nothing if there are none."""
    notices = []
    if lines := unlike(views):
        items = [tag("li", escape(line), tag("small", escape(f" {places}"))) for line, places in lines]
        text = "These runs were measured under different protocols. The numbers named here must not be compared."
        notices.append(
            tag("div", tag("h3", "Unlike protocols"), tag("p", text), tag("ul", *items), class_="notice bad")
        )
    if lines_of_gaps := gaps(views):
        text = "Not every run has every task and attack, and a mean is over the tasks that its run has."
        notices.append(_notice("Not in every run", text, lines_of_gaps))
    if lines_of_doubt := doubts(views):
        notices.append(_notice("Doubtful", "Run `robustclip test` again.", lines_of_doubt))
    return "".join(notices)


def _notice(title: str, text: str, lines: Sequence[str]) -> str:
    items = [tag("li", escape(line)) for line in lines]
    return tag("div", tag("h3", title), tag("p", escape(text)), tag("ul", *items), class_="notice")


def _places(places: Mapping[str, Sequence[str]], views: Sequence[View]) -> str:
    kinds, tasks = union(views, of="kinds"), union(views, of="tasks")
    if all(list(places.get(task, ())) == kinds for task in tasks):
        return "(all tasks)"
    named = [task if list(of) == kinds else f"{task} {', '.join(of)}" for task, of in places.items()]
    more = f"; and {len(named) - LISTED} more tasks" if len(named) > LISTED else ""
    return f"({'; '.join(named[:LISTED])}{more})"
