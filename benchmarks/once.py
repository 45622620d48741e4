"""Runs each fit and test once, so that an interrupted script resumes, and formats tables; shared by several scripts."""

import argparse
import csv
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustclip.cli.lightning import main as robustclip
from robustclip.results.provenance import commit

RUN = "cell.json"  # file beside a checkpoint: settings and CPU time of the fit


def fit_once(folder: Path, options: Sequence[str], **facts: Any) -> Path:
    """Fits if needed, keeps ``facts`` and CPU seconds in the run folder, and returns the path of the checkpoint."""
    if not (folder / RUN).is_file():
        started = time.process_time()
        robustclip([
            *("fit", *options, "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger.save_dir", str(folder.parent), "--trainer.logger.version", folder.name),
        ])  # fmt: skip
        cost = {"cpu_seconds": round(time.process_time() - started)}
        (folder / RUN).write_text(json.dumps(facts | cost) + "\n")
    return folder / "checkpoints" / "last.ckpt"


def held_out(checkpoint: Path, *kinds: str) -> dict[str, float]:
    """Reads the last accuracies on the held-out images of a fit, in [0, 1], by kind, such as ``clean`` and ``pgd2``."""
    rows = list(csv.DictReader((checkpoint.parents[1] / "metrics.csv").open()))
    last = next(row for row in reversed(rows) if row["val/mean/clean/acc1"])
    return {kind: float(last[f"val/mean/{kind}/acc1"]) for kind in kinds}


def test_once(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Tests if needed, and returns the result in its folder."""
    if not (folder / "result.json").is_file():
        places = ("--results.folder", str(folder.parent), "--results.name", folder.name)
        # No logger: it numbers its folder, and two tests that start together would use one number.
        robustclip(["test", *options, *places, "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"])
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def parser(description: str | None, *, data: bool = True) -> argparse.ArgumentParser:
    """Builds a parser with the options for the folders, those of data and model only if `data` is true."""
    command_line = argparse.ArgumentParser(description=description)
    if data:
        command_line.add_argument("--data", required=True, help="folder of the data sets")
        command_line.add_argument("--model", required=True, help="folder of the model")
    command_line.add_argument("--work", type=Path, required=True, help="folder of fits and tests")
    command_line.add_argument("--out", type=Path, help="JSON file to write")
    return command_line


def over_seeds(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """Formats ``74.4 [73.9, 75.0]``, in percent: mean of the rows, lowest and highest mean of a seed."""
    seeds = sorted({row["seed"] for row in rows})
    means = [100 * statistics.mean(row[measure] for row in rows if row["seed"] == seed) for seed in seeds]
    spread = f" [{min(means):.1f}, {max(means):.1f}]" if len(means) > 1 else ""
    return f"{statistics.mean(means):.1f}{spread}"


def write(out: Path | None, results: Any, **more: Any) -> None:
    """Writes results and ``more`` to a file, with commit and command; does nothing without a file."""
    if out is not None:
        facts = {"commit": commit(), "command": shlex.join(["python", *sys.argv])}
        out.write_text(json.dumps({**facts, **more, "results": results}, indent=1) + "\n")
