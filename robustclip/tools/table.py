"""``robustclip table`` prints several results in one table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from robustclip import display
from robustclip.results.run import Run, method_of
from robustclip.results.tables import SUCCESS


def table(results: list[Path]) -> None:
    """Prints the accuracies of several tests side by side, in percent.

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
    display.console().print(printed)


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
