"""Runs of robustclip that are made once: a script that uses them goes on where it was ended."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustclip.cli import main as robustclip

RUN = "cell.json"  # beside a checkpoint: what the fit was, and what it cost


def fit_once(folder: Path, words: Sequence[str], **told: Any) -> Path:
    """The checkpoint of a fit in its run folder, beside which ``told`` and the CPU seconds are kept."""
    if not (folder / RUN).is_file():
        started = time.process_time()
        robustclip([
            *("fit", *words, "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger.save_dir", str(folder.parent), "--trainer.logger.version", folder.name),
        ])  # fmt: skip
        cost = {"cpu_seconds": round(time.process_time() - started)}
        (folder / RUN).write_text(json.dumps(told | cost) + "\n")
    return folder / "checkpoints" / "last.ckpt"


def test_once(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The result of a test in its folder."""
    if not (folder / "result.json").is_file():
        places = ("--results.folder", str(folder.parent), "--results.name", folder.name)
        robustclip(["test", *words, *places, "--trainer.enable_progress_bar", "false"])
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
