"""``robustclip compare`` compares two tests sample by sample, and refuses tests with unlike protocols."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustclip import display
from robustclip.intervals import Difference, holm, mcnemar, mean_difference, paired_difference
from robustclip.results import protocol
from robustclip.results.run import Run
from robustclip.results.summary import is_correct
from robustclip.results.tables import SUCCESS

ALPHA = 0.05
MEAN = "mean"  # the mean over all compared tasks
Key = tuple[str, str]
"""Task and attack."""
Protocols = Mapping[Key, protocol.Axes]


@dataclass(frozen=True)
class Comparison:
    """One task under one attack, on the samples that both runs have.

    Args:
        task: name of the task.
        attack: name of the attack, or ``clean``.
        n: number of paired samples.
        a: accuracy of run A in [0, 1].
        b: accuracy of run B in [0, 1].
        difference: B minus A, with its interval.
        only_a: number of samples that only A classifies correctly.
        only_b: number of samples that only B classifies correctly.
        p: p-value of McNemar's test.
        adjusted: p-value adjusted by Holm's method over all rows of the comparison.
    """

    task: str
    attack: str
    n: int
    a: float
    b: float
    difference: Difference
    only_a: int
    only_b: int
    p: float
    adjusted: float

    @property
    def is_significant(self) -> bool:
        """Whether the adjusted p-value is at most 5 %."""
        return self.adjusted <= ALPHA


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of one attack over all compared tasks or some of them.

    Args:
        name: name of the mean.
        attack: name of the attack, or ``clean``.
        a: mean accuracy of run A in [0, 1].
        b: mean accuracy of run B in [0, 1].
        difference: B minus A, with its interval.
    """

    name: str
    attack: str
    a: float
    b: float
    difference: Difference


@dataclass(frozen=True)
class Comparisons:
    """Outcome of comparing two runs.

    Args:
        rows: comparisons per task and attack, in the order of run A.
        means: means per attack: averages that both runs take over equal tasks, and the mean of all tasks.
        notes: sentences about parts that were not compared, or only partly.
    """

    rows: list[Comparison]
    means: list[Mean]
    notes: list[str]


def compare(a: Path, b: Path, *, shared_samples: bool = False) -> None:
    """Prints the paired differences between two tests, with p-values and confidence intervals.

    Args:
        a: folder of a finished test, or its result.json.
        b: folder of the test to compare with it, or its result.json.
        shared_samples: if only samples or their images differ, compares the samples that are equal in both tests.

    Raises:
        ValueError: the protocols are unlike, the tests share no task, or a folder holds no finished test.
    """
    run_a, run_b = Run.open(a), Run.open(b)
    comparisons = pair(run_a, run_b, shared_samples=shared_samples)
    console = display.console()
    console.print(f"A: {run_a.folder} ({run_a.method})\nB: {run_b.folder} ({run_b.method})")
    console.print(_as_table(comparisons))
    for note in comparisons.notes:
        console.print(note)


def pair(a: Run, b: Run, *, shared_samples: bool = False) -> Comparisons:
    """Compares two runs by sample id.

    Args:
        a: first run.
        b: run to compare with it.
        shared_samples: if only samples or their images differ, compares the samples that are equal in both runs.

    Raises:
        ValueError: the protocols are unlike, or the runs share no task.
    """
    axes_a, axes_b = _axes(a), _axes(b)
    keys = [key for key in axes_a if key in axes_b]
    if not keys:
        raise ValueError(f"{a.folder} and {b.folder} share no task under the same attack, so nothing can be compared")
    tasks = list(dict.fromkeys(task for task, _ in keys))
    ledgers = {task: (by_id(a, task), by_id(b, task)) for task in tasks}
    unlike, partly = _unlike(axes_a, axes_b, keys, ledgers, shared_samples=shared_samples)
    if unlike:
        more = f"; as do {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise ValueError(f"{a.folder} and {b.folder} measured different things: {unlike[0]}{more}")
    rows, notes = [], []
    for task in tasks:
        in_a, in_b, note = _paired_rows(a, b, task, *ledgers[task], is_partial=task in partly)
        notes += note
        for attack in [attack for name, attack in keys if name == task]:
            rows.append(_row(task, attack, _is_correct(a, task, in_a, attack), _is_correct(b, task, in_b, attack)))
    adjusted = holm([row.p for row in rows])
    rows = [replace(row, adjusted=value) for row, value in zip(rows, adjusted, strict=True)]
    notes += [*unchecked_images(a, b), *unlike_replayed(a, b, keys, ledgers), *unlike_unknown(a, b)]
    notes += [*_unpaired(axes_a, axes_b), *_unlike_origin(a, b)]
    return Comparisons(rows, _means(rows, _averages(a, b), a.result), notes)


def _unlike_origin(a: Run, b: Run) -> list[str]:
    """Writes one sentence each where two runs have other seeds or were made by other commits of the package."""
    seeds = [(run.result.get("config") or {}).get("seed_everything") for run in (a, b)]
    commits = [run.result.get("commit") for run in (a, b)]
    notes = []
    if None not in seeds and seeds[0] != seeds[1]:
        notes.append(f"the runs have seeds {seeds[0]} and {seeds[1]}; intervals do not cover the spread over seeds")
    if None not in commits and commits[0] != commits[1]:
        notes.append(f"the runs were made by commits {commits[0]} and {commits[1]} of the package")
    return notes


def unchecked_images(a: Run, b: Run) -> list[str]:
    """Writes one sentence about the tasks for which one of two runs has no hashes of the pixels.

    Args:
        a: first run.
        b: second run.

    Returns:
        The sentence, or an empty list if both runs have hashes for all shared tasks.
    """
    axes_a, axes_b = _axes(a), _axes(b)
    tasks = [key[0] for key in axes_a if key in axes_b and not protocol.is_checked(axes_a[key], axes_b[key])]
    names = ", ".join(dict.fromkeys(tasks))
    why = "a result has no hashes of the pixels; test again with this version"
    line = f"{names}: it is not checked that {a.name} and {b.name} used the same images, because {why}"
    return [line] if tasks else []


def unlike_replayed(
    a: Run, b: Run, keys: Sequence[Key], ledgers: Mapping[str, tuple[protocol.Rows, protocol.Rows]]
) -> list[str]:
    """Writes one sentence per attack of which two defences on the same weights replayed other images.

    Args:
        a: first run.
        b: second run.
        keys: tasks and attacks that both runs have.
        ledgers: task to the rows of both runs by sample id.
    """
    models = [run.result.get("model") or {} for run in (a, b)]
    if any("defence" not in model for model in models) or models[0].get("weights") != models[1].get("weights"):
        return []
    lines = []
    for task, attack in keys:
        name = f"{attack}.replayed"
        pairs = [
            (row[name], ledgers[task][1][number][name])
            for number, row in ledgers[task][0].items()
            if number in ledgers[task][1] and row.get(name) and ledgers[task][1][number].get(name)
        ]
        if unequal := sum(one != other for one, other in pairs):
            lines.append(
                f"{task} under {attack}: undefended and static rest on other attacked images for {unequal} of"
                f" {len(pairs)} samples; test both with one batch size on one kind of device"
            )
    return lines


def unlike_unknown(a: Run, b: Run) -> list[str]:
    """Writes one sentence per unknown set, and per score of a user, that differs between two runs.

    Args:
        a: first run.
        b: second run.
    """
    sets_a, sets_b = _unknown_sets(a), _unknown_sets(b)
    lines = {name: protocol.differences(sets_a[name], sets_b[name]) for name in sets_a if name in sets_b}
    remedy = "do not compare the detection"
    in_a, in_b = ((run.result.get("detection") or {}).get("scores", {}) for run in (a, b))
    scores = {name: (in_a[name], in_b[name]) for name in in_a if in_a[name] != in_b.get(name, in_a[name])}
    return [
        *(f"unknown set {name} differs in {'; '.join(axes)}: {remedy}" for name, axes in lines.items() if axes),
        *(f"score {name} differs: {one} against {other}: {remedy}" for name, (one, other) in scores.items()),
    ]


def _unknown_sets(run: Run) -> dict[str, protocol.Axes]:
    """Collects the protocols of the sets of unknown classes, by name."""
    tasks = (run.result.get("detection") or {}).get("tasks", {}).values()
    return {name: values.get("data", {}) for task in tasks for name, values in task.get("unknown", {}).items()}


def _axes(run: Run) -> Protocols:
    """Collects the protocols by task and attack."""
    try:
        tasks = run.result["protocol"].items()
        return {(task, attack): entry["axes"] for task, attacks in tasks for attack, entry in attacks.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{run.folder}: result.json needs axes per task and attack in protocol; test again") from error


def _unpaired(a: Collection[Key], b: Collection[Key]) -> list[str]:
    """Writes one sentence per run with tasks or attacks that the other run lacks."""
    only = {"A": [key for key in a if key not in b], "B": [key for key in b if key not in a]}
    places = {name: ", ".join(f"{task} under {attack}" for task, attack in keys) for name, keys in only.items()}
    return [f"only in {name}: {listed}" for name, listed in places.items() if listed]


def _unlike(
    a: Protocols,
    b: Protocols,
    keys: Sequence[Key],
    ledgers: Mapping[str, tuple[protocol.Rows, protocol.Rows]],
    *,
    shared_samples: bool,
) -> tuple[list[str], set[str]]:
    """Lists the reasons against a comparison, and the tasks that differ only in their samples."""
    refused, partly = [], set()
    for task, attack in keys:
        lines = protocol.with_counts(protocol.differences(a[task, attack], b[task, attack]), *ledgers[task])
        if lines and all(line.startswith(("sample_ids:", "pixels:")) for line in lines):
            partly.add(task)
            lines[-1] += " (--shared_samples true compares those that both have)"
            lines = [] if shared_samples else lines
        if lines:
            refused.append(f"{task} under {attack} differs in {'; '.join(lines)}")
    return refused, partly


def _paired_rows(
    a: Run, b: Run, task: str, in_a: protocol.Rows, in_b: protocol.Rows, *, is_partial: bool
) -> tuple[protocol.Rows, protocol.Rows, list[str]]:
    """Pairs the rows of the samples that both runs have, and writes a note if some are left out."""
    shared = [number for number in in_a if number in in_b and protocol.shows_same(in_a[number], in_b[number])]
    if not is_partial and not len(shared) == len(in_a) == len(in_b):
        raise ValueError(
            f"ledgers of {task} in {a.folder} and {b.folder} differ in their samples, although the protocols are equal:"
            f" {len(in_a)} and {len(in_b)}, {len(shared)} in both; test again"
        )
    if not shared and (in_a or in_b):
        raise ValueError(f"{a.folder} and {b.folder} share no sample of {task}, so it cannot be compared")
    for number in shared:
        labels = in_a[number]["label"], in_b[number]["label"]
        if labels[0] != labels[1]:
            raise ValueError(
                f"sample {number} of {task} has label {labels[0]} in {a.folder} and {labels[1]} in {b.folder};"
                " the data sets differ"
            )
    note = f"{task}: the {len(shared)} samples that both have, of {len(in_a)} in A and {len(in_b)} in B"
    if left_out := len(in_a.keys() & in_b.keys()) - len(shared):
        note += f"; {left_out} more have different images"
    chosen_a, chosen_b = ({number: rows[number] for number in shared} for rows in (in_a, in_b))
    return chosen_a, chosen_b, [note] if is_partial else []


def by_id(run: Run, task: str) -> protocol.Rows:
    """Reads the rows of a task's ledger by sample id, and checks them.

    Args:
        run: finished test.
        task: name of the task.

    Raises:
        ValueError: a column is missing, or an id occurs twice.
    """
    rows = run.rows(task)
    try:
        by_number = {int(row["id"]): row for row in rows}
        _ = [(row["label"], row["clean"]) for row in rows]
    except (KeyError, ValueError) as error:
        raise ValueError(f"ledger of {task} in {run.folder} needs id, label and clean: {error}") from error
    if len(by_number) < len(rows):
        raise ValueError(
            f"ledger of {task} in {run.folder} has {len(rows)} rows for {len(by_number)} samples; test again"
        )
    return by_number


def _is_correct(run: Run, task: str, rows: protocol.Rows, attack: str) -> list[bool]:
    if attack == "clean":
        return [row["clean"] == row["label"] for row in rows.values()]
    try:
        is_aimed = SUCCESS in run.result["tasks"].get(task, {}).get(attack, {})
        return [is_correct(row, attack, is_aimed=is_aimed) for row in rows.values()]
    except KeyError as error:
        raise ValueError(f"ledger of {task} in {run.folder} has no column {error}; test again") from error


def _row(task: str, attack: str, a: Sequence[bool], b: Sequence[bool]) -> Comparison:
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    p, difference = mcnemar(only_a, only_b), paired_difference(b, a)
    return Comparison(task, attack, len(a), _share(a), _share(b), difference, only_a, only_b, p, p)


def _share(is_correct: Sequence[bool]) -> float:
    return sum(is_correct) / len(is_correct) if is_correct else math.nan


def _averages(a: Run, b: Run) -> dict[str, list[str]]:
    """Collects the averages that both runs take over equal tasks: tasks by the average's name."""
    of_a, of_b = (run.result.get("averages", {}) for run in (a, b))
    return {name: of_a[name]["tasks"] for name in of_a if of_b.get(name, {}).get("tasks") == of_a[name]["tasks"]}


def _means(rows: Sequence[Comparison], averages: Mapping[str, Sequence[str]], result: Mapping[str, Any]) -> list[Mean]:
    """Computes the averages whose tasks are all compared, then the mean over all compared tasks, per attack."""
    images = {task: values.get("images_of", task) for task, values in result["tasks"].items()}
    means = []
    for name, attack in product([*averages, MEAN], dict.fromkeys(row.attack for row in rows)):
        tasks = averages.get(name)
        chosen = [row for row in rows if row.attack == attack and (tasks is None or row.task in tasks)]
        if tasks is None or len(chosen) == len(tasks):
            counts = [(row.only_b, row.only_a, row.n) for row in chosen]
            difference = mean_difference(counts, images=[images.get(row.task, row.task) for row in chosen])
            a, b = (sum(values) / len(chosen) for values in ([row.a for row in chosen], [row.b for row in chosen]))
            means.append(Mean(name, attack, a, b, difference))
    return means


def _as_table(comparisons: Comparisons) -> Table:
    """Formats the comparison as a table, in percent and percentage points."""
    title = f"top-1 accuracy in percent\n* B differs from A at {ALPHA:.0%} (Holm, {len(comparisons.rows)} tests)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "attack"):
        table.add_column(name, overflow="fold")
    for name in ("n", "A", "B", "B - A\n95 % interval", "correct only\nin A / B", "p  \nHolm's p  "):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparisons.rows:
        cells = (str(row.n), _percent(row.a), _percent(row.b), _points(row.difference))
        p = f"{row.p:.1g}  \n{row.adjusted:.1g} {'*' if row.is_significant else ' '}"
        table.add_row(row.task, row.attack, *cells, f"{row.only_a} / {row.only_b}", p)
    table.add_section()
    for mean in comparisons.means:
        table.add_row(mean.name, mean.attack, "", _percent(mean.a), _percent(mean.b), _points(mean.difference))
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(difference: Difference) -> str:
    return "{:+.1f}\n{:+.1f} to {:+.1f}".format(*(100 * value for value in difference))
