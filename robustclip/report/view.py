"""Reads the results and ledgers of runs for the report, once, and checks them."""

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
    """An accuracy and its 95 % interval.

    Args:
        value: accuracy in [0, 1].
        low: lower limit of the interval.
        high: upper limit of the interval.
        correct: number of correct samples; None for means.
    """

    value: float
    low: float
    high: float
    correct: int | None = None

    @property
    def text(self) -> str:
        """Accuracy in percent."""
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
    """One run of the report.

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
        """Grade of the audit, or a dash if there is none."""
        return str((self.run.result.get("audit") or {}).get("grade") or MISSING)

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """Checks of the audit."""
        checks: Sequence[Mapping[str, Any]] = (self.run.result.get("audit") or {}).get("checks") or []
        return checks

    @property
    def has_failed(self) -> bool:
        """Whether the audit failed; the accuracy under attack is then no evidence of robustness."""
        return self.grade == "F"

    @property
    def label(self) -> str:
        """Name of the run, with a mark that every table and legend shows if its audit failed."""
        return f"{self.name} {FAILED}" if self.has_failed else self.name

    @property
    def kinds(self) -> list[str]:
        """Names of the accuracies: ``clean`` and the attacks."""
        return list(self.mean)

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, without ``clean``."""
        return [kind for kind in self.mean if kind != CLEAN]

    def task(self, name: str) -> Mapping[str, Any]:
        """Returns the part of the result about one task."""
        values: Mapping[str, Any] = self.run.result["tasks"][name]
        return values

    def axes(self, task: str, kind: str) -> Mapping[str, Any]:
        """Returns the protocol of one accuracy.

        Args:
            task: name of the task.
            kind: ``clean`` or name of the attack.

        Returns:
            Values by axis; empty if the run does not have this accuracy.
        """
        axes: Mapping[str, Any] = self.run.result["protocol"].get(task, {}).get(kind, {}).get("axes", {})
        return axes

    @property
    def geometry(self) -> Mapping[str, Mapping[str, float | None]]:
        """Measures of `FeatureGeometry`, by task or captioned set."""
        geometry: Mapping[str, Mapping[str, float | None]] = self.run.result.get("geometry") or {}
        return geometry

    @property
    def detection(self) -> Mapping[str, Any]:
        """Measures and settings of `OODDetection`; empty if it did not run."""
        detection: Mapping[str, Any] = self.run.result.get("detection") or {}
        return detection

    @property
    def interpolation(self) -> tuple[str, float] | None:
        """Fingerprint and share of the fine-tuned weights, for a model between them and the original."""
        origin = (self.run.result.get("model") or {}).get("interpolation")
        return (str(origin["fine_tuned"]), float(origin["alpha"])) if origin else None

    def members(self, attack: str) -> list[str]:
        """Lists the members of an attack that misclassified samples, in the order in which they try."""
        planned = [self.axes(task, attack).get("steps") for task in self.scores]
        tried = [name for steps in planned if isinstance(steps, dict) for name in steps]
        named = [name for task in self.scores for name in self.task(task).get(attack, {}).get("broken_by") or {}]
        counted = [name for task in self.scores for name in sorted(self.successes[task].get(attack, {}))]
        return [name for name in dict.fromkeys([*tried, *named, *counted]) if name in {*named, *counted} - {"", CLEAN}]


def views(paths: Sequence[Path]) -> list[View]:
    """Reads runs, in the order of the paths.

    Raises:
        ValueError: a folder holds no finished test, or its result lacks a value that the report shows.
    """
    runs = [Run.open(path) for path in paths]
    methods = Counter(run.result["method"] for run in runs)
    labels = [_label(run) if methods[run.result["method"]] > 1 else str(run.result["method"]) for run in runs]
    seen: Counter[str] = Counter()
    opened = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        seen[label] += 1
        unique = f"{label} ({seen[label]})" if seen[label] > 1 else label
        try:
            opened.append(_view(run, unique, number))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{run.folder} cannot be shown in a report: its result lacks {error}") from error
    return opened


def union(views: Sequence[View], *, of: str) -> list[str]:
    """Lists the names that any run has, in the order of the runs.

    Args:
        views: runs of the report.
        of: ``tasks``, ``averages`` or ``kinds`` (``clean`` and attacks).
    """
    names = ({"tasks": view.scores, "averages": view.averages, "kinds": view.mean}[of] for view in views)
    return list(dict.fromkeys(chain.from_iterable(names)))


def averaged(view: View, average: str) -> list[str]:
    """Lists the tasks of an average.

    Args:
        view: the run.
        average: name of the average.

    Returns:
        Names of the tasks; empty if the run does not have this average.
    """
    return list(view.run.result["averages"][average]["tasks"]) if average in view.averages else []


def percent(value: float) -> str:
    """Formats a share in percent with one decimal; a number that is not finite becomes a dash."""
    return f"{100 * value:.1f}" if math.isfinite(value) else MISSING


def _label(run: Run) -> str:
    """Names a run by method and folder, or by its folder alone if this begins with the method."""
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
