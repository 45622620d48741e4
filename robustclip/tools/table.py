"""``robustclip table``: several results in one table."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table(results: list[Path]) -> None:
    """Prints the accuracies of several result files side by side, in percent.

    Args:
        results: JSON files that ``robustclip test`` wrote.

    Raises:
        ValueError: a file that is no result.
    """
    runs = [_read(path) for path in results]
    columns = [(run, kind) for run in runs for kind in run["mean"]]
    shown = Table(title="top-1 accuracy in percent", show_footer=True)
    shown.add_column("task", footer="mean")
    for run, kind in columns:
        mean = f"{100 * run['mean'][kind]['acc1']:.1f}"
        shown.add_column(f"{run['method']}\n{kind}", justify="right", footer=mean)
    for name in dict.fromkeys(name for run in runs for name in run["tasks"]):
        cells = [run["tasks"].get(name, {}).get(kind, {}).get("acc1") for run, kind in columns]
        shown.add_row(name, *("" if cell is None else f"{100 * cell:.1f}" for cell in cells))
    Console().print(shown)


def _read(path: Path) -> Any:
    try:
        run = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `robustclip test`: {error}") from error
    if not isinstance(run, dict) or not {"method", "tasks", "mean"} <= run.keys():
        raise ValueError(f"{path} is no result of `robustclip test`: it lacks method, tasks or mean")
    return run
