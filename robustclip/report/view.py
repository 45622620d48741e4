"""Reads the results and ledgers of runs for the report, once, and checks them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from robustclip.results.run import Run

CLEAN = "clean"
MEAN = "mean"  # name of the mean over all tasks
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
        averages: per named average over some of the tasks, and attack.
        mean: per attack, over all tasks.
        successes: per task and attack the number of samples that each member misclassified, from the ledger; ``clean``
            counts samples that were misclassified without attack, the empty name counts robust ones.
    """

    run: Run
    name: str
    number: int
    scores: Mapping[str, Mapping[str, Score]]
    averages: Mapping[str, Mapping[str, Score]]
    mean: Mapping[str, Score]
    successes: Mapping[str, Mapping[str, Counter[str]]]

    def part(self, name: str) -> Mapping[str, Any]:
        """Returns a part of the result, such as ``audit`` or ``geometry``; empty if the test did not compute it."""
        part: Mapping[str, Any] = self.run.result.get(name) or {}
        return part

    @property
    def grade(self) -> str:
        """Grade of the audit, or a dash if there is none."""
        return str(self.part("audit").get("grade") or MISSING)

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """Checks of the audit."""
        return self.part("audit").get("checks") or []

    @property
    def has_failed(self) -> bool:
        """Whether the audit failed; the accuracy under attack is then no evidence of robustness."""
        return self.grade == "F"

    @property
    def label(self) -> str:
        """Name of the run, with a mark that every table and legend shows if its audit failed."""
        return f"{self.name} {FAILED}" if self.has_failed else self.name

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, without ``clean``."""
        return [kind for kind in self.mean if kind != CLEAN]

    @property
    def named(self) -> Mapping[str, Mapping[str, Score]]:
        """Accuracies by task, then by average, then the mean over all tasks."""
        return {**self.scores, **self.averages, MEAN: self.mean}

    def averaged(self, name: str) -> set[str]:
        """Returns the tasks of a named average, or of the mean; empty if the run does not have the average."""
        if name == MEAN:
            return set(self.scores)
        return set(self.part("averages")[name]["tasks"]) if name in self.averages else set()

    def axes(self, task: str, kind: str) -> Mapping[str, Any]:
        """Returns the protocol of one accuracy, as values by axis; empty if the run does not have this accuracy.

        Args:
            task: name of the task.
            kind: ``clean`` or name of the attack.
        """
        axes: Mapping[str, Any] = self.part("protocol").get(task, {}).get(kind, {}).get("axes", {})
        return axes

    def members(self, attack: str) -> list[str]:
        """Lists the members of an attack that misclassified samples, in the order in which they try."""
        planned = [self.axes(task, attack).get("steps") for task in self.scores]
        tried = [name for steps in planned if isinstance(steps, dict) for name in steps]
        results = self.part("tasks").values()
        named = [name for values in results for name in values.get(attack, {}).get("broken_by") or {}]
        counted = [name for task in self.scores for name in sorted(self.successes[task].get(attack, {}))]
        return [name for name in dict.fromkeys([*tried, *named, *counted]) if name in {*named, *counted} - {"", CLEAN}]


def views(paths: Sequence[Path]) -> list[View]:
    """Reads runs, in the order of the paths.

    Raises:
        ValueError: a folder holds no finished test, or its result lacks a value that the report shows.
    """
    runs = [Run.open(path) for path in paths]
    methods = Counter(run.method for run in runs)
    labels = [_label(run) if methods[run.method] > 1 else run.method for run in runs]
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


def union(views: Sequence[View], *, of: Literal["scores", "averages", "mean", "attacks"]) -> list[str]:
    """Lists the names that any run has, in the order of the runs.

    Args:
        views: runs of the report.
        of: attribute with the names: ``scores`` has tasks, ``mean`` has ``clean`` and attacks.
    """
    return list(dict.fromkeys(chain.from_iterable(getattr(view, of) for view in views)))


def percent(value: float | None) -> str:
    """Formats a share in percent with one decimal; no number, or one that is not finite, becomes a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def _label(run: Run) -> str:
    """Names a run by method and folder, or by its folder alone if this begins with the method."""
    method = run.method
    return run.name if run.name.lower().startswith(method.lower()) else f"{method} {run.name}"


def _view(run: Run, name: str, number: int) -> View:
    def scores_of(values: Mapping[str, Any]) -> dict[str, Score]:
        return {kind: _score(values[kind]) for kind in result["mean"] if kind in values}

    result = run.result
    for task, values in result["tasks"].items():
        if "n" not in values or task not in result["protocol"]:
            raise KeyError(f"n or protocol of {task}")
    scores = {task: scores_of(values) for task, values in result["tasks"].items()}
    averages = {name: scores_of(values) for name, values in result.get("averages", {}).items()}
    successes = {}
    for task, by_kind in scores.items():
        rows = run.rows(task)
        successes[task] = {kind: Counter(row[f"{kind}.by"] for row in rows) for kind in by_kind if kind != CLEAN}
    return View(run, name, number, scores, averages, scores_of(result["mean"]), successes)


def _score(values: Mapping[str, Any]) -> Score:
    low, high = values["interval"]
    return Score(float(values["acc1"]), float(low), float(high), values.get("correct"))
