"""A run as the report reads it: its result and ledgers, read once and checked."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from robustclip.results.run import Run

CLEAN = "clean"
LEVEL = "95\N{NO-BREAK SPACE}%"
MISSING = "\N{EN DASH}"
FAILED = "✕ failed audit"


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

    @property
    def limits(self) -> list[str]:
        """Value and both limits in percent."""
        return [percent(value) for value in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class View:
    """A run as the report shows it.

    Args:
        run: the finished test.
        name: distinguishes it from the other runs of the report.
        number: its place among them, from 0.
        scores: per task and attack, ``clean`` among the attacks.
        mean: per attack, over the tasks.
        averages: per named average over some of the tasks, per attack.
        successes: per task and attack the number of samples that each member misclassified, from the ledger; ``clean``
            counts samples that were misclassified without attack, the empty name counts robust ones.
    """

    run: Run
    name: str
    number: int
    scores: Mapping[str, Mapping[str, Score]]
    mean: Mapping[str, Score]
    averages: Mapping[str, Mapping[str, Score]]
    successes: Mapping[str, Mapping[str, Counter[str]]]

    @property
    def grade(self) -> str:
        """Grade of the audit; a dash without one."""
        return str((self.run.result.get("audit") or {}).get("grade") or MISSING)

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """Checks of the audit."""
        found: Sequence[Mapping[str, Any]] = (self.run.result.get("audit") or {}).get("checks") or []
        return found

    @property
    def has_failed(self) -> bool:
        """Whether the audit failed, so that the accuracy under attack is no evidence."""
        return self.grade == "F"

    @property
    def label(self) -> str:
        """Name of the run, with a mark that every table and legend shows if its audit failed."""
        return f"{self.name} {FAILED}" if self.has_failed else self.name

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
        found = [name for task in self.scores for name in sorted(self.successes[task].get(attack, {}))]
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


def _view(run: Run, name: str, number: int) -> View:
    result = run.result
    kinds = list(result["mean"])
    scores = {
        task: {kind: _score(values[kind]) for kind in kinds if kind in values}
        for task, values in result["tasks"].items()
    }
    for task, values in result["tasks"].items():
        if "n" not in values or task not in result["protocol"]:
            raise KeyError(f"n or protocol of {task}")
    successes = {}
    for task, by_kind in scores.items():
        rows = run.rows(task)
        successes[task] = {kind: Counter(row[f"{kind}.by"] for row in rows) for kind in by_kind if kind != CLEAN}
    mean = {kind: _score(result["mean"][kind]) for kind in kinds}
    averages = {
        name: {kind: _score(values[kind]) for kind in kinds} for name, values in result.get("averages", {}).items()
    }
    return View(run, name, number, scores, mean, averages, successes)


def _score(values: Mapping[str, Any]) -> Score:
    low, high = values["interval"]
    return Score(float(values["acc1"]), float(low), float(high), values.get("correct"))
