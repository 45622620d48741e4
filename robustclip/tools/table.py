"""``robustclip table`` prints several results in one table."""

from pathlib import Path

from rich.table import Table

from robustclip import display
from robustclip.results.run import Run, method_of


def table(results: list[Path]) -> None:
    """Prints the accuracies of several tests side by side, in percent.

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
    display.console().print(printed)
