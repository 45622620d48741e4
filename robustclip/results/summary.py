"""The result of a test as a function of its ledgers and of the facts that no row holds."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from robustclip.intervals import mean_interval, wilson
from robustclip.results import ledger
from robustclip.results.protocol import with_samples
from robustclip.results.run import FACTS, LEDGERS, RESULT
from robustclip.results.tables import CLEAN, csv_table, markdown_table
from robustclip.textfiles import read_text

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Record:
    """Everything that a result is computed from.

    Attributes:
        facts: content of ``facts.json``: model, settings, protocol, classes and attacks of the test, in JSON's types.
        rows: every ledger by its name, in the order of the sample ids. A task's ledger has the name of the task.
    """

    facts: Mapping[str, Any]
    rows: Mapping[str, Rows]

    @classmethod
    def open(cls, folder: Path) -> "Record":
        """Read the record of a finished test.

        Raises:
            ValueError: a file is missing or damaged, or an older version wrote the folder.
        """
        try:
            facts = json.loads(read_text(folder / FACTS))
            names = [*facts["tasks"], *facts["tables"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} has no {FACTS} of `robustclip test`: {error}") from error
        return cls(facts, {name: ledger.read(folder / LEDGERS / f"{name}.csv") for name in names})

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Protocol of every task under every attack, with the samples that were evaluated."""
        return {task: with_samples(axes, self.rows[task]) for task, axes in self.facts["protocol"].items()}

    def settings(self, section: str) -> dict[str, Any]:
        """Settings and facts that a section has stored under its name."""
        found: dict[str, Any] = self.facts["sections"][section]
        return found


Summarise = Callable[[Record], Any]
"""A section of a result: a function of the record, whose value JSON can hold."""


def summarise(record: Record, sections: Mapping[str, Summarise]) -> dict[str, Any]:
    """Compute the content of ``result.json``.

    Args:
        record: facts and rows of a test.
        sections: by name, the functions that make the parts of the result beside the accuracies.
    """
    facts = record.facts
    names = {
        task: {attack: [member["name"] for member in members] for attack, members in attacks.items()}
        for task, attacks in facts["members"].items()
    }
    table = accuracies({task: record.rows[task] for task in facts["tasks"]}, names, facts["bad_samples"])
    heading = ("method", "is_undefended", "finished", "versions", "commit", "device", "config", "model")
    return {
        **{key: facts[key] for key in heading},
        **with_averages(table, facts["averages"]),
        **{name: function(record) for name, function in sections.items()},
        **({"other_metrics": facts["other_metrics"]} if facts["other_metrics"] else {}),
        "notes": [
            f"{task} under {attack}: {member['note']}"
            for task, attacks in facts["members"].items()
            for attack, members in attacks.items()
            for member in members
            if member["note"]
        ],
        "classes": {task: given["classes"] for task, given in facts["tasks"].items()},
        "protocol": record.protocol,
    }


def accuracies(
    rows: Mapping[str, Rows], members: Mapping[str, Mapping[str, Sequence[str]]], bad_samples: Mapping[str, int]
) -> dict[str, Any]:
    """Accuracies of every task without and under attack, with 95 % intervals, and their means over the tasks.

    Args:
        rows: of every task, by its name.
        members: task and attack to the names of the attack's members.
        bad_samples: number of a task's images that did not decode.
    """
    tasks: dict[str, dict[str, Any]] = {}
    kinds = [CLEAN, *next(iter(members.values()), {})]
    for task, found in rows.items():
        correct = {CLEAN: sum(row["clean"] == row["label"] for row in found)}
        correct |= {attack: sum(not row[f"{attack}.by"] for row in found) for attack in members[task]}
        tasks[task] = {
            "n": len(found),
            **{kind: _accuracy(count, len(found)) for kind, count in correct.items()},
            "bad_samples": bad_samples.get(task, 0),
            "seconds": sum(float(row[ledger.TIME_COLUMN]) for row in found),
        }
        for attack, names in members[task].items():
            by = Counter(row[f"{attack}.by"] for row in found)
            tasks[task][attack]["broken_by"] = {name: by[name] for name in names}
    return {"tasks": tasks, "mean": {kind: _mean(tasks.values(), kind) for kind in kinds} if tasks else {}}


def scalars(table: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `accuracies` by the path to be logged under."""
    found: dict[str, float] = {}
    for task, values in table["tasks"].items():
        for key, value in values.items():
            if isinstance(value, dict):
                found |= {f"{task}/{key}/{name}": float(value[name]) for name in ("correct", "acc1")}
            else:
                found[f"{task}/{key}"] = float(value)
    return found | {f"mean/{kind}/acc1": values["acc1"] for kind, values in table["mean"].items()}


def with_averages(table: dict[str, Any], averages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Add unweighted means over some of the tasks, under ``averages``.

    Args:
        table: of `accuracies`.
        averages: name to the names of tasks.
    """
    found = {}
    for name, tasks in averages.items():
        chosen = [table["tasks"][task] for task in tasks]
        found[name] = {"tasks": list(tasks)} | {
            kind: {"acc1": fmean(task[kind]["acc1"] for task in chosen), "interval": _interval_of_mean(chosen, kind)}
            for kind in table["mean"]
        }
    return table | ({"averages": found} if found else {})


def finite(value: float) -> float | None:
    """The number, or None in the place of nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a result with its tables.

    Args:
        folder: of the test.
        result: content of ``result.json``.
    """
    ledger.write_aside(folder / "table.csv", csv_table(result))
    ledger.write_aside(folder / "table.md", markdown_table(result))
    ledger.write_aside(folder / RESULT, json.dumps(result, indent=1) + "\n")


def _accuracy(correct: int, n: int) -> dict[str, Any]:
    share = float(torch.tensor(correct) / n)  # in fp32, the precision of logged metrics
    return {"acc1": share, "correct": correct, "interval": list(wilson(correct, n))}


def _mean(tasks: Iterable[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    tasks = list(tasks)
    share = torch.tensor([task[kind]["acc1"] for task in tasks], dtype=torch.float32).mean()
    return {"acc1": float(share), "interval": _interval_of_mean(tasks, kind)}


def _interval_of_mean(tasks: Iterable[Mapping[str, Any]], kind: str) -> list[float]:
    return list(mean_interval([(task[kind]["correct"], task["n"]) for task in tasks]))
