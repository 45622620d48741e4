"""One immutable result file per test, and its tables."""

import csv
import io
import json
import os
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from robustclip.callbacks.progress import TaskProgress

PACKAGES = ("torch", "torchvision", "lightning", "open_clip_torch", "torchmetrics", "torchattacks")
NOT_A_TASK = "mean"


class ResultsWriter(Callback):
    """Writes what a test measured as JSON, CSV and Markdown, prints a table, and prints the JSON's path last.

    Nothing is overwritten: a name that exists gets a number. Files are written aside and renamed.

    Args:
        folder: where results go; null for ``results`` below the trainer's ``default_root_dir``.
        config: what the run was started with, kept in the file.
    """

    def __init__(self, folder: str | None = None, config: dict[str, Any] | None = None) -> None:
        self.folder, self.config = folder, config
        self.path: Path | None = None
        self._table: Table | None = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the logged metrics."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results = {
            "method": type(pl_module).__name__,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"robustclip": metadata.version("robustclip"), **_versions()},
            "commit": _commit(),
            "device": _device(trainer),
            "config": self.config,
            **tabulate(metrics, stage="test"),
        }
        folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "results"
        self.path = write_new(folder, results)
        self._table = rich_table(results)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table and, last, where it lies."""
        if self._table is not None:
            if isinstance(trainer.progress_bar_callback, TaskProgress):
                trainer.progress_bar_callback.close()
            console = Console()
            console.print(self._table)
            console.print(f"The same as CSV and Markdown lies beside\n{self.path}", soft_wrap=True)
            self._table = None


def tabulate(metrics: dict[str, float], *, stage: str) -> dict[str, Any]:
    """Turns ``<stage>/<task>/<attack>/<metric>`` into ``{"tasks": {task: {...}}, "mean": {...}}``."""
    tasks: dict[str, dict[str, Any]] = {}
    mean: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if parts[0] != stage or len(parts) not in (3, 4):
            continue
        number = round(value) if parts[-1] in ("n", "correct", "bad_samples") else value
        if len(parts) == 3:
            tasks.setdefault(parts[1], {})[parts[2]] = number
        elif parts[1] == NOT_A_TASK:
            mean.setdefault(parts[2], {})[parts[3]] = value
        else:
            tasks.setdefault(parts[1], {}).setdefault(parts[2], {})[parts[3]] = number
    # The callbacks' metrics are logged before the module's; people expect clean accuracy first.
    return {"tasks": tasks, "mean": {kind: mean[kind] for kind in sorted(mean, key=lambda kind: kind != "clean")}}


def write_new(folder: Path, results: dict[str, Any]) -> Path:
    """Writes JSON, CSV and Markdown under a name that did not exist, and returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{results['method'].lower()}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    number = 0
    while True:
        path = folder / (f"{stem}-{number}.json" if number else f"{stem}.json")
        try:
            path.open("x").close()  # claims the name, also against a run that ends in the same second
            break
        except FileExistsError:
            number += 1
    rows = table_rows(results)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(path.with_suffix(".csv"), text.getvalue())
    _write(path.with_suffix(".md"), markdown(rows))
    _write(path, json.dumps(results, indent=1) + "\n")
    return path


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Header, one row per task, and the mean; accuracies in percent."""
    kinds = list(results["mean"])
    has_bad = any(values.get("bad_samples") for values in results["tasks"].values())
    header = ["task", "n", *kinds, "seconds", *(["left out"] if has_bad else [])]
    rows = [header]
    for name, values in results["tasks"].items():
        accuracies = [f"{100 * values[kind]['acc1']:.1f}" for kind in kinds]
        bad = [str(values.get("bad_samples", 0))] if has_bad else []
        rows.append([name, str(values["n"]), *accuracies, f"{values.get('seconds', 0):.1f}", *bad])
    means = [f"{100 * results['mean'][kind]['acc1']:.1f}" for kind in kinds]
    total = sum(values.get("seconds", 0) for values in results["tasks"].values())
    rows.append([NOT_A_TASK, "", *means, f"{total:.1f}", *([""] if has_bad else [])])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned numbers."""
    lines = [rows[0], ["---", *["--:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rich_table(results: dict[str, Any]) -> Table:
    """The same table for a terminal."""
    rows = table_rows(results)
    table = Table(title=f"{results['method']}: top-1 accuracy in percent")
    for number, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if number else "left", footer=rows[-1][number])
    table.show_footer = True
    for row in rows[1:-1]:
        table.add_row(*row)
    return table


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _commit() -> str | None:
    """Commit of the code that ran, if it ran from a git checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _device(trainer: Trainer) -> str:
    return f"{trainer.world_size} x {trainer.strategy.root_device}, precision {trainer.precision}"
