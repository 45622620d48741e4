"""Shows the evidence behind the numbers: the runs, their audits, and their protocols."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robustclip.report.blocks import Axes, Axis, Block, Checks, Facts, Fold, Heading, Text
from robustclip.report.section import Section
from robustclip.report.svg import run_entry
from robustclip.report.view import View, union
from robustclip.results.protocol import AXES

RANKS = {"fail": 0, "warn": 1, "not_measured": 2, "pass": 3}  # an unknown status is ranked as a failure


class Audit(Section):
    """Checks of every run's audit."""

    title = "Audit"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns the checks of each run, failures first."""
        return [Checks(run_entry(view), view.number, view.grade, _ranked(view)) for view in views]


class Protocol(Section):
    """Protocol of every task."""

    title = "Protocol"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns one folded table per task."""
        text = "Two numbers are comparable only if these axes agree. An axis is shown once where all runs agree."
        return [Text(text), *(_task(views, task) for task in union(views, of="scores"))]


class Runs(Section):
    """Model, device and versions of every run."""

    title = "Runs"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns the facts of each run; versions are folded away."""
        blocks: list[Block] = []
        for view in views:
            blocks += [Heading(view.label), Facts(_facts(view))]
            blocks += [Fold("Versions", [Facts(view.part("versions"))])] if view.part("versions") else []
        return blocks


def _facts(view: View) -> dict[str, str]:
    result, model = view.run.result, view.part("model")
    facts = {
        "method": result["method"],
        "model": model.get("arch") or model.get("pretrained"),
        "image size": model.get("image_size"),
        "weights": model.get("weights"),
        "checkpoint": model.get("checkpoint") or "none",
        "folder": view.run.name,
        "commit": result.get("commit") or "unknown",
        "device": result.get("device"),
        "finished": str(result.get("finished") or "").replace("T", " ").replace("+00:00", " UTC"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _ranked(view: View) -> list[Mapping[str, Any]]:
    return sorted(view.checks, key=lambda check: RANKS.get(check.get("status", ""), 0))


def _task(views: Sequence[View], task: str) -> Fold:
    having = [view for view in views if task in view.scores]
    items = []
    for axis, meaning in AXES.items():
        per_run = [
            {kind: view.axes(task, kind)[axis] for kind in view.mean if axis in view.axes(task, kind)}
            for view in having
        ]
        shared = {kind for values in per_run for kind in values if all(kind in other for other in per_run)}
        is_unlike = any(values[kind] != per_run[0][kind] for values in per_run for kind in shared)
        items.append(Axis(axis.replace("_", " "), meaning, _values(having, per_run), is_unlike))
    unlike = [item.name for item in items if item.is_unlike]
    warning = f"runs differ in {', '.join(unlike)}" if unlike else ""
    return Fold(task, [Axes(f"Protocol of {task}", items)], warning=warning)


def _values(views: Sequence[View], per_run: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Lists the distinct values of an axis, each with the attacks and runs that have it."""
    is_shared = all(values == per_run[0] for values in per_run)
    owners: dict[str, dict[str, list[str]]] = {}
    for view, values in list(zip(views, per_run, strict=True))[: 1 if is_shared else None]:
        for kind, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            owners.setdefault(text, {}).setdefault("" if is_shared else view.name, []).append(kind)
    if is_shared and len(owners) == 1:
        return [("", text) for text in owners]
    return [(_owned(by_run, per_run), text) for text, by_run in owners.items()]


def _owned(by_run: Mapping[str, Sequence[str]], per_run: Sequence[Mapping[str, Any]]) -> str:
    """Names the runs, each with its attacks unless it has the value for all of them."""
    most = max(len(values) for values in per_run)
    return "; ".join(
        name if name and len(kinds) == most else f"{name} {', '.join(kinds)}".strip() for name, kinds in by_run.items()
    )
