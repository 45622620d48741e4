"""Searches settings of a fit with Optuna; each trial is an ordinary `robustclip fit` on cached features.

This is an example to copy: the grid, or a sampler of Optuna, proposes values, and the held-out accuracy of the fit is
the objective. The study is stored in a file, so that an interrupted search resumes and several processes may share it.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import torch

from robustclip.cli.lightning import main as robustclip

GRID: dict[str, list[float]] = {
    "model.lambda1": [0.0, 1.0, 5.0, 10.0, 15.0],
    "model.lambda2": [0.0, 1.0, 10.0, 100.0, 1000.0],
}
METRIC = "val/mean/clean/acc1"


def held_out(folder: Path, options: Sequence[str]) -> float:
    """Fits if needed, and returns the best held-out accuracy in [0, 1]."""
    places = ("--trainer.logger.save_dir", str(folder.parent), "--trainer.logger.version", folder.name)
    robustclip(["fit", *options, *places, "--trainer.enable_progress_bar", "false"])
    with (folder / "metrics.csv").open() as file:
        return max(float(row[METRIC]) for row in csv.DictReader(file) if row[METRIC])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing trials, and prints the best one and the time."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="All other options are those of `robustclip fit`.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the study and its runs")
    parser.add_argument("--trials", type=int, help="number of trials; the whole grid if not given")
    arguments, options = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)

    def objective(trial: optuna.Trial) -> float:
        chosen = {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
        words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        return held_out(arguments.work / f"trial{trial.number}", [*options, *words])

    study = optuna.create_study(
        storage=f"sqlite:///{arguments.work / 'study.db'}",
        study_name="grid",
        direction="maximize",
        sampler=optuna.samplers.GridSampler(GRID, seed=0),
        load_if_exists=True,
    )
    started, cpu = time.perf_counter(), time.process_time()
    study.optimize(objective, n_trials=arguments.trials)
    seconds = f"{time.perf_counter() - started:.0f} s, {time.process_time() - cpu:.0f} CPU seconds"
    print(f"{len(study.trials)} trials, {seconds}: {study.best_value:.4f} at {study.best_params}")


if __name__ == "__main__":
    main()
