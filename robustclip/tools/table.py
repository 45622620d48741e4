"""``robustclip table`` prints several results in one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from robustclip import display
from robustclip.results.corruption_error import CORRUPTIONS, TASKS, errors_of, mean_corruption_error
from robustclip.results.protocol import differences
from robustclip.results.run import Run
from robustclip.results.tables import DETECTION, NOT_A_TASK, SUCCESS, means_of

Column = tuple[Run, str]
"""A test, and the heading of one of its accuracies."""


def table(results: list[Path]) -> None:
    """Prints the accuracies of several tests side by side, in percent, and what else they measured.

    Where all accuracies do not fit on one line, there is one table for each of them: without attack, and per attack.
    Lines below the tables name the tests that did not measure alike.

    Args:
        results: folders that ``robustclip test`` wrote.

    Raises:
        ValueError: a folder holds no result.
    """
    runs = [Run.open(path) for path in results]
    names = _names(runs)
    columns = [(run, heading) for run in runs for heading in _shares(run.result["mean"])]
    console = display.console()
    tables = [_accuracies("top-1 accuracy in percent", columns, names)]
    if not _fits(tables[0], console):
        by_heading = {heading: [column for column in columns if column[1] == heading] for _, heading in columns}
        tables = [
            _accuracies(f"{heading}: top-1 accuracy in percent", chosen, names)
            for heading, chosen in by_heading.items()
        ]
    for printed in (*tables, _detection(runs, names), _corruptions(runs, names)):
        if printed.row_count:
            console.print(printed)
    for line in _unlike(runs, names):
        console.print(line)


def _unlike(runs: Sequence[Run], names: Mapping[Path, str]) -> list[str]:
    """Writes one line per axis of the protocol in which a test differs from the first one with the same accuracy."""
    first: dict[tuple[str, str], tuple[Run, Any]] = {}
    differing: dict[tuple[Path, Path, str], list[str]] = {}
    for run in runs:
        for task, attacks in run.result["protocol"].items():
            for attack, entry in attacks.items():
                own = entry.get("axes") or {}  # results of older versions have none
                other, axes = first.setdefault((task, attack), (run, own))
                for line in differences(axes, own) if axes and own else ():
                    key = other.folder, run.folder, line.partition(":")[0]
                    differing.setdefault(key, []).append(f"{task} under {attack} in {line}")
    return [
        f"not comparable: {names[a]} and {names[b]} differ for {lines[0]}"
        f"{f'; as do {len(lines) - 1} more' if len(lines) > 1 else ''}"
        for (a, b, _), lines in differing.items()
    ]


def _names(runs: Sequence[Run]) -> dict[Path, str]:
    """Returns the methods of the tests by their folders, with the folder where several tests are of one method."""
    methods = [run.method for run in runs]
    return {run.folder: run.method if methods.count(run.method) == 1 else f"{run.method} {run.name}" for run in runs}


def _fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width


def _accuracies(title: str, columns: Sequence[Column], names: Mapping[Path, str]) -> Table:
    """Tabulates accuracies by set, their averages, and the grades of the audits."""
    printed = Table(title=title, show_footer=True)
    printed.add_column("task", footer="mean")
    for run, heading in columns:
        footer = _percent(_shares(run.result["mean"])[heading])
        printed.add_column(f"{names[run.folder]}\n{heading}", justify="right", footer=footer)
    results = [(run.result, heading) for run, heading in columns]
    for name in dict.fromkeys(name for result, _ in results for name in result["tasks"]):
        printed.add_row(
            name, *(_percent(_shares(result["tasks"].get(name, {})).get(heading)) for result, heading in results)
        )
    printed.add_section()
    averages = [means_of(result) for result, _ in results]
    for name in dict.fromkeys(name for means in averages for name in means if name != NOT_A_TASK):
        shares = (_shares(means.get(name, {})).get(column[1]) for means, column in zip(averages, columns, strict=True))
        printed.add_row(name, *map(_percent, shares))
    grades = [result.get("audit", {}).get("grade", "") for result, _ in results]
    if any(grades):
        printed.add_row("audit", *grades)
    printed.add_section()
    return printed


def _detection(runs: Sequence[Run], names: Mapping[Path, str]) -> Table:
    """Tabulates AUROC and H of the headline score, per known and unknown set."""
    printed = Table(title="known against unknown classes in percent")
    for name in ("test", "known", "unknown", "score", "AUROC", "attacked", "H"):
        printed.add_column(name, justify="right" if name in ("AUROC", "attacked", "H") else "left")
    for run in runs:
        section = run.result.get(DETECTION) or {"tasks": {}}
        for task, summary in section["tasks"].items():
            for name, unknown in summary["unknown"].items():
                values = unknown["scores"][section["headline"]]
                numbers = (values["auroc"], values.get("attacked", {}).get("auroc"), values["h"])
                printed.add_row(names[run.folder], task, name, section["headline"], *map(_percent, numbers))
    return printed


def _corruptions(runs: Sequence[Run], names: Mapping[Path, str]) -> Table:
    """Tabulates the mean errors on corrupted copies, and the mean corruption errors relative to the first test."""
    table = Table(title="error on corrupted copies in percent")
    for name in ("test", "set", "attack", "mean error", "mCE", "relative mCE"):
        table.add_column(name, justify="left" if name in ("test", "set", "attack") else "right")
    for run in runs:
        for name, section in run.result.get(CORRUPTIONS, {}).items():
            for kind, errors in section.items():
                if kind != TASKS:
                    reference = errors_of(runs[0].result, run.result, name, kind)
                    ratios = {} if isinstance(reference, str) else mean_corruption_error(errors, reference)
                    cells = [errors["error"], ratios.get("mce"), ratios.get("relative_mce")]
                    texts = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
                    table.add_row(names[run.folder], name, kind, *texts)
    return table


def _shares(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Lists the accuracies of a task or mean by the headings of their columns, and the success of targeted attacks."""
    shares: dict[str, float | None] = {}
    for kind, accuracy in values.items():
        if isinstance(accuracy, dict) and "acc1" in accuracy:
            shares[kind] = accuracy["acc1"]
            shares |= {f"{kind} {SUCCESS}": accuracy[SUCCESS]["rate"]} if SUCCESS in accuracy else {}
    return shares


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
