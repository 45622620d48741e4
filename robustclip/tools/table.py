"""``robustclip table`` prints several results in one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from robustclip import display
from robustclip.results.corruption_error import CORRUPTIONS, TASKS, errors_of, mean_corruption_error
from robustclip.results.run import Run, method_of
from robustclip.results.tables import SUCCESS


def table(results: list[Path]) -> None:
    """Prints the accuracies of several tests side by side, in percent, and their mean corruption errors.

    Args:
        results: folders that ``robustclip test`` wrote.

    Raises:
        ValueError: a folder holds no result.
    """
    runs = [Run.open(path).result for path in results]
    columns = [(run, heading) for run in runs for heading in _shares(run["mean"])]
    printed = Table(title="top-1 accuracy in percent", show_footer=True)
    printed.add_column("task", footer="mean")
    for run, heading in columns:
        footer = _percent(_shares(run["mean"])[heading])
        printed.add_column(f"{method_of(run)}\n{heading}", justify="right", footer=footer)
    for name in dict.fromkeys(name for run in runs for name in run["tasks"]):
        printed.add_row(name, *(_percent(_shares(run["tasks"].get(name, {})).get(heading)) for run, heading in columns))
    console = display.console()
    console.print(printed)
    if (errors := _corruptions(runs)).row_count:
        console.print(errors)


def _corruptions(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulates the mean errors on corrupted copies, and the mean corruption errors relative to the first test."""
    table = Table(title="error on corrupted copies in percent")
    for name in ("test", "set", "attack", "mean error", "mCE", "relative mCE"):
        table.add_column(name, justify="left" if name in ("test", "set", "attack") else "right")
    for run in runs:
        for name, section in run.get(CORRUPTIONS, {}).items():
            for kind, errors in section.items():
                if kind != TASKS:
                    reference = errors_of(runs[0], run, name, kind)
                    ratios = {} if reference is None else mean_corruption_error(errors, reference)
                    cells = [errors["error"], ratios.get("mce"), ratios.get("relative_mce")]
                    texts = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
                    table.add_row(method_of(run), name, kind, *texts)
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
