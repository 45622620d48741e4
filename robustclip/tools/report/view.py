"""What the report shows of a run, taken from its result once and checked."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from robustclip.runs import Run

CLEAN = "clean"
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Score:
    """An accuracy and its 95 % interval, in [0, 1]."""

    value: float
    low: float
    high: float
    correct: int | None = None

    @property
    def text(self) -> str:
        """In percent."""
        return percent(self.value)

    @property
    def interval(self) -> str:
        """Both limits in percent."""
        return f"{percent(self.low)} to {percent(self.high)}"


@dataclass(frozen=True)
class View:
    """A run as the report shows it.

    Args:
        run: where it lies.
        label: tells it from the other runs of the report.
        number: its place among them, from 0.
        scores: per task and attack, ``clean`` among the attacks.
        mean: per attack, over the tasks.
        averages: over some of the tasks, by the name that they were given, per attack.
        broken: per task and attack, how many samples each member broke, in the ledger; ``clean`` for those that were
            wrong without an attack, empty for those that no attack broke.
    """

    run: Run
    label: str
    number: int
    scores: Mapping[str, Mapping[str, Score]]
    mean: Mapping[str, Score]
    averages: Mapping[str, Mapping[str, Score]]
    broken: Mapping[str, Mapping[str, Counter[str]]]

    @property
    def kinds(self) -> list[str]:
        """``clean`` and the attacks."""
        return list(self.mean)

    @property
    def attacks(self) -> list[str]:
        """Without ``clean``."""
        return [kind for kind in self.mean if kind != CLEAN]

    def task(self, name: str) -> Mapping[str, Any]:
        """What the result says of a task."""
        found: Mapping[str, Any] = self.run.result["tasks"][name]
        return found

    def axes(self, task: str, kind: str) -> Mapping[str, Any]:
        """The protocol of one number; empty if the run does not have it."""
        found: Mapping[str, Any] = self.run.result["protocol"].get(task, {}).get(kind, {}).get("axes", {})
        return found

    @property
    def geometry(self) -> Mapping[str, Mapping[str, float | None]]:
        """What `FeatureGeometry` measured, by task or captioned set."""
        found: Mapping[str, Mapping[str, float | None]] = self.run.result.get("geometry") or {}
        return found

    @property
    def detection(self) -> Mapping[str, Any]:
        """What `OODDetection` measured, and how; empty if it did not."""
        found: Mapping[str, Any] = self.run.result.get("detection") or {}
        return found

    @property
    def interpolation(self) -> tuple[str, float] | None:
        """The fine-tuned weights and their share, for a model between them and the original."""
        found = (self.run.result.get("model") or {}).get("interpolation")
        return (str(found["fine_tuned"]), float(found["alpha"])) if found else None

    def members(self, attack: str) -> list[str]:
        """Who can break a sample, in the order in which they try."""
        planned = [self.axes(task, attack).get("steps") for task in self.scores]
        tried = [name for steps in planned if isinstance(steps, dict) for name in steps]
        named = [name for task in self.scores for name in self.task(task).get(attack, {}).get("broken_by") or {}]
        found = [name for task in self.scores for name in sorted(self.broken[task].get(attack, {}))]
        return [name for name in dict.fromkeys([*tried, *named, *found]) if name in {*named, *found} - {"", CLEAN}]


def views(paths: Sequence[Path]) -> list[View]:
    """Reads runs, in the order given.

    Raises:
        ValueError: a folder is no finished test, or lacks what the report shows.
    """
    runs = [Run.open(path) for path in paths]
    methods = Counter(run.result["method"] for run in runs)
    labels = [_label(run) if methods[run.result["method"]] > 1 else str(run.result["method"]) for run in runs]
    seen: Counter[str] = Counter()
    found = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        seen[label] += 1
        unique = f"{label} ({seen[label]})" if seen[label] > 1 else label
        try:
            found.append(_view(run, unique, number))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{run.folder} is no result that a report can show: it lacks {error}") from error
    return found


def union(views: Sequence[View], *, of: str) -> list[str]:
    """Tasks, averages or kinds (``clean`` and attacks) that any run has, in the order of the runs."""
    names = ({"tasks": view.scores, "averages": view.averages, "kinds": view.mean}[of] for view in views)
    return list(dict.fromkeys(chain.from_iterable(names)))


def averaged(view: View, average: str) -> list[str]:
    """The tasks of an average; none where the run has not taken it."""
    return list(view.run.result["averages"][average]["tasks"]) if average in view.averages else []


def percent(value: float) -> str:
    """With one decimal; a dash for what cannot be told."""
    return f"{100 * value:.1f}" if math.isfinite(value) else MISSING


def _label(run: Run) -> str:
    """Method and folder; the folder alone where it is named after the method."""
    method = str(run.result["method"])
    return run.name if run.name.lower().startswith(method.lower()) else f"{method} {run.name}"


def _view(run: Run, label: str, number: int) -> View:
    result = run.result
    kinds = list(result["mean"])
    scores = {
        task: {kind: _score(values[kind]) for kind in kinds if kind in values}
        for task, values in result["tasks"].items()
    }
    for task, values in result["tasks"].items():
        if "n" not in values or task not in result["protocol"]:
            raise KeyError(f"n or protocol of {task}")
    broken = {}
    for task, by_kind in scores.items():
        rows = run.rows(task)
        broken[task] = {kind: Counter(row[f"{kind}.by"] for row in rows) for kind in by_kind if kind != CLEAN}
    mean = {kind: _score(result["mean"][kind]) for kind in kinds}
    averages = {
        name: {kind: _score(values[kind]) for kind in kinds} for name, values in result.get("averages", {}).items()
    }
    return View(run, label, number, scores, mean, averages, broken)


def _score(values: Mapping[str, Any]) -> Score:
    low, high = values["interval"]
    return Score(float(values["acc1"]), float(low), float(high), values.get("correct"))
