"""``robustclip table`` prints several results in one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from robustclip import display
from robustclip.results.corruption_error import CORRUPTIONS, TASKS, errors_of, mean_corruption_error
from robustclip.results.run import Run, method_of


def table(results: list[Path]) -> None:
    """Prints the accuracies of several tests side by side, in percent, and their mean corruption errors.

    Args:
        results: folders that ``robustclip test`` wrote.

    Raises:
        ValueError: a folder holds no result.
    """
    runs = [Run.open(path).result for path in results]
    columns = [(run, kind) for run in runs for kind in run["mean"]]
    printed = Table(title="top-1 accuracy in percent", show_footer=True)
    printed.add_column("task", footer="mean")
    for run, kind in columns:
        mean = f"{100 * run['mean'][kind]['acc1']:.1f}"
        printed.add_column(f"{method_of(run)}\n{kind}", justify="right", footer=mean)
    for name in dict.fromkeys(name for run in runs for name in run["tasks"]):
        cells = [run["tasks"].get(name, {}).get(kind, {}).get("acc1") for run, kind in columns]
        printed.add_row(name, *("" if cell is None else f"{100 * cell:.1f}" for cell in cells))
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
