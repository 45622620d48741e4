"""The result of a test as a function of its ledgers and of the facts that no row holds."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch

from robustclip import persistence
from robustclip.intervals import mean_interval
from robustclip.results import ledger
from robustclip.results.protocol import digest, with_samples
from robustclip.results.run import FACTS, LEDGERS, RESULT, check_is_whole, read_facts
from robustclip.results.tables import ADAPTIVE, CLEAN, COLUMNS, STATIC, SUCCESS, UNDEFENDED, csv_table, markdown_table

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Record:
    """All input of a result.

    Attributes:
        facts: content of ``facts.json``: model, settings, protocol, classes and attacks of the test, in JSON's types.
        rows: every ledger by its name, in the order of the sample ids. A task's ledger has the name of the task.
    """

    facts: Mapping[str, Any]
    rows: Mapping[str, Rows]

    @classmethod
    def open(cls, folder: Path) -> "Record":
        """Reads the record of a finished test.

        Raises:
            ValueError: a file is missing or damaged, an older version wrote the folder, or the test is a shard.
        """
        facts = read_facts(folder)
        check_is_whole(folder, facts)
        return cls(facts, {name: ledger.read(folder / LEDGERS / f"{name}.csv") for name in ledger_names(folder, facts)})

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """The protocol of every task under every attack, with the evaluated samples."""
        return {task: with_samples(axes, self.rows[task]) for task, axes in self.facts["protocol"].items()}

    def settings(self, section: str) -> dict[str, Any]:
        """Returns the settings and facts of a section."""
        settings: dict[str, Any] = self.facts["sections"][section]
        return settings


def ledger_names(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Lists the ledgers of a test.

    Args:
        folder: folder of the test, for the message.
        facts: content of its ``facts.json``.

    Raises:
        ValueError: the facts are incomplete.
    """
    try:
        return [*facts["tasks"], *facts["tables"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no {FACTS} of `robustclip test`: {error}") from error


Summarise = Callable[[Record], Any]
"""Function from a record to a section of the result, in JSON's types."""


def summarise(record: Record, sections: Mapping[str, Summarise]) -> dict[str, Any]:
    """Computes the content of ``result.json``.

    Args:
        record: facts and rows of a test.
        sections: functions of the parts of the result beside the accuracies, by their names.
    """
    facts = record.facts
    names = {
        task: {attack: [member["name"] for member in members] for attack, members in attacks.items()}
        for task, attacks in facts["members"].items()
    }
    rows = {task: record.rows[task] for task in facts["tasks"]}
    aims = {
        task: {attack: members[0]["aim"] for attack, members in attacks.items() if members and "aim" in members[0]}
        for task, attacks in facts["members"].items()
    }
    images = shared_images(facts["protocol"])
    table = with_averages(accuracies(rows, names, facts["bad_samples"], aims, images), facts["averages"])
    if facts["model"].get("defence") is not None:
        add_undefended(table, rows, names)
    heading = ("method", "is_undefended", "finished", "versions", "commit", "device", "config", "model")
    return {
        **{key: facts[key] for key in heading},
        **table,
        **{name: function(record) for name, function in sections.items()},
        **({"other_metrics": facts["other_metrics"]} if facts["other_metrics"] else {}),
        "notes": [
            f"{task} under {attack}: {member['note']}"
            for task, attacks in facts["members"].items()
            for attack, members in attacks.items()
            for member in members
            if member["note"]
        ],
        "classes": {task: values["classes"] for task, values in facts["tasks"].items()},
        "protocol": record.protocol,
    }


def accuracies(
    rows: Mapping[str, Rows],
    members: Mapping[str, Mapping[str, Sequence[str]]],
    bad_samples: Mapping[str, int],
    aims: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    images: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Computes the accuracies of every task with and without attack, with 95 % intervals, and their means.

    The accuracy under an attack with a target class is that on its images. Its ``success`` is the share of the images
    of other classes that are predicted as the target.

    Args:
        rows: rows of every task, by its name.
        members: task and attack to the names of the attack's members.
        bad_samples: number of a task's images that did not decode.
        aims: task and attack to the number of the class that the attack moves images to.
        images: of tasks that share their images, the name of these; intervals of means take them as dependent.
    """
    tasks: dict[str, dict[str, Any]] = {}
    kinds = [CLEAN, *next(iter(members.values()), {})]
    for task, samples in rows.items():
        correct = {CLEAN: sum(row["clean"] == row["label"] for row in samples)}
        aimed = aims.get(task, {})
        correct |= {
            attack: sum(is_correct(row, attack, is_aimed=attack in aimed) for row in samples)
            for attack in members[task]
        }
        tasks[task] = {
            "n": len(samples),
            **{kind: _accuracy(count, len(samples)) for kind, count in correct.items()},
            "bad_samples": bad_samples.get(task, 0),
            "seconds": sum(float(row[ledger.TIME_COLUMN]) for row in samples),
            **({"images_of": images[task]} if task in images else {}),
        }
        for attack, names in members[task].items():
            by = Counter(row[f"{attack}.by"] for row in samples)
            tasks[task][attack]["broken_by"] = {name: by[name] for name in names}
        for attack, aim in aimed.items():
            tasks[task][attack][SUCCESS] = {"aim": aim, **_success(samples, f"{attack}.by", aim)}
    return {"tasks": tasks, "mean": {kind: _mean(tasks.values(), kind) for kind in kinds} if tasks else {}}


def is_correct(row: Mapping[str, str], attack: str, *, is_aimed: bool) -> bool:
    """Returns whether a sample counts as correct under an attack.

    Args:
        row: row of the ledger.
        attack: name of the attack.
        is_aimed: whether the attack has a target class; then the attacked image decides.
    """
    return row[f"{attack}.prediction"] == row["label"] if is_aimed else not row[f"{attack}.by"]


def _success(samples: Rows, column: str, aim: int) -> dict[str, Any]:
    """Counts the images of other classes that are moved to a target class, by the column of the member that did so."""
    others = [row for row in samples if int(row["label"]) != aim]
    count = sum(bool(row[column]) for row in others)
    return {
        "rate": count / len(others) if others else None,
        "count": count,
        "n": len(others),
        "left_out": len(samples) - len(others),
        "interval": list(mean_interval([(count, len(others))])) if others else [0.0, 1.0],
    }


def add_undefended(
    table: Mapping[str, Any], rows: Mapping[str, Rows], members: Mapping[str, Mapping[str, Sequence[str]]]
) -> None:
    """Adds to a table the accuracies of a method without its test-time defence, and under replayed images.

    Every task and attack gets ``undefended``: the attack on the method without its defence; ``static``: the defended
    method on these images and on those at the end of that attack; ``adaptive``: the worst case over all ways through
    the defence, which also is the accuracy of the attack; ``replayed``: a hash of all replayed images; ``by_way``: the
    number of samples that each way misclassified first. Clean accuracies get ``undefended``. Every task gets ``cost``:
    seconds of a defended answer divided by those of an undefended one. Of an attack with a target class, ``success``
    gets ``undefended`` and ``static`` in place of the accuracies.

    Args:
        table: table of `with_averages`, changed in place.
        rows: rows of every task, by its name.
        members: task and attack to the names of the members, such as ``bare.apgd``.
    """
    tasks = table["tasks"]
    for task, values in tasks.items():
        samples, n = rows[task], len(rows[task])
        values[CLEAN][UNDEFENDED] = _accuracy(sum(row["bare"] == row["label"] for row in samples), n)
        bare, defended = (sum(float(row[f"{name}_seconds"]) for row in samples) for name in ("bare", "defended"))
        values["cost"] = defended / bare if bare else None
        for attack, names in members[task].items():
            _add_columns(values[attack], samples, attack)
            by = Counter(row[f"{attack}.by"].partition(".")[0] for row in samples)
            values[attack]["replayed"] = digest(
                sorted((int(row["id"]), row.get(f"{attack}.replayed")) for row in samples)
            )
            values[attack]["by_way"] = {way: by[way] for way in dict.fromkeys(name.partition(".")[0] for name in names)}
    for means, chosen in [
        (table["mean"], list(tasks)),
        *((average, average["tasks"]) for average in table.get("averages", {}).values()),
    ]:
        for kind in table["mean"]:
            means[kind] |= _mean_success([tasks[task] for task in chosen], kind)
            for column in [column for column in COLUMNS if column in tasks[chosen[0]][kind]]:
                means[kind][column] = _mean([{**tasks[t], kind: tasks[t][kind][column]} for t in chosen], kind)


def _add_columns(accuracy: dict[str, Any], samples: Rows, attack: str) -> None:
    """Adds the columns of a defended method to an attack's accuracy, or to its success if it has a target class."""
    success, own = accuracy.get(SUCCESS), {key: accuracy[key] for key in ("acc1", "correct", "interval")}
    for column in (UNDEFENDED, STATIC):
        name = f"{attack}.{column}"
        if success is not None:
            success[column] = _success(samples, name, success["aim"])
        else:
            accuracy[column] = _accuracy(sum(not row[name] for row in samples), len(samples))
    if success is None:
        accuracy[ADAPTIVE] = own


def scalars(table: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of `accuracies` by their names for Lightning's log."""
    numbers: dict[str, float] = {}
    for task, values in table["tasks"].items():
        for key, value in values.items():
            if isinstance(value, dict):
                numbers |= {f"{task}/{key}/{name}": float(value[name]) for name in ("correct", "acc1")}
                if SUCCESS in value:
                    numbers[f"{task}/{key}/{SUCCESS}"] = float("nan" if (v := value[SUCCESS]["rate"]) is None else v)
            elif not isinstance(value, str):
                numbers[f"{task}/{key}"] = float(value)
    return numbers | {f"mean/{kind}/acc1": values["acc1"] for kind, values in table["mean"].items()}


def with_averages(table: dict[str, Any], averages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Adds unweighted means over some of the tasks, under ``averages``.

    Args:
        table: table of `accuracies`.
        averages: name to the names of tasks.
    """
    means = {}
    for name, tasks in averages.items():
        chosen = [table["tasks"][task] for task in tasks]
        means[name] = {"tasks": list(tasks)} | {
            kind: {"acc1": fmean(task[kind]["acc1"] for task in chosen), "interval": _interval_of_mean(chosen, kind)}
            | _mean_success(chosen, kind)
            for kind in table["mean"]
        }
    return table | ({"averages": means} if means else {})


def shared_images(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Returns, for every task that shares its images with others, the name of the set that they come from.

    Args:
        protocol: axes by task and attack, ``clean`` among the attacks.
    """
    sets = {
        task: attacks[CLEAN]["corruption"]["of"] for task, attacks in protocol.items() if "corruption" in attacks[CLEAN]
    }
    return {task: sets.get(task, task) for task in protocol if task in sets or task in sets.values()}


def finite(value: float) -> float | None:
    """Replaces nan and infinity, which JSON does not have, by None."""
    return value if math.isfinite(value) else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes a result with its tables.

    Args:
        folder: folder of the test.
        result: content of ``result.json``.
    """
    persistence.atomic_write(folder / "table.csv", csv_table(result))
    persistence.atomic_write(folder / "table.md", markdown_table(result))
    persistence.atomic_write(folder / RESULT, json.dumps(result, indent=1) + "\n")


def _accuracy(correct: int, n: int) -> dict[str, Any]:
    share = float(torch.tensor(correct) / n)  # in fp32, the precision of logged metrics
    return {"acc1": share, "correct": correct, "interval": list(mean_interval([(correct, n)]))}


def _mean(tasks: Iterable[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    tasks = list(tasks)
    share = torch.tensor([task[kind]["acc1"] for task in tasks], dtype=torch.float32).mean()
    return {"acc1": float(share), "interval": _interval_of_mean(tasks, kind), **_mean_success(tasks, kind)}


def _mean_success(tasks: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """Computes the mean success of an attack with a target class; empty for other attacks."""
    parts = [task[kind][SUCCESS] for task in tasks if SUCCESS in task[kind]]
    if not any(part["n"] for part in parts):
        return {}
    of_columns = {name: _mean_rate([part[name] for part in parts]) for name in COLUMNS if name in parts[0]}
    return {SUCCESS: {**_mean_rate(parts), **of_columns}}


def _mean_rate(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes the mean of the success rates of the tasks that have images of other classes."""
    counted = [part for part in parts if part["n"]]
    interval = list(mean_interval([(part["count"], part["n"]) for part in counted]))
    return {"rate": fmean(part["rate"] for part in counted), "interval": interval}


def _interval_of_mean(tasks: Iterable[Mapping[str, Any]], kind: str) -> list[float]:
    tasks = list(tasks)
    images = [task.get("images_of", number) for number, task in enumerate(tasks)]
    return list(mean_interval([(task[kind]["correct"], task["n"]) for task in tasks], images=images))
