"""Run by test_processes.py on one process or two: the same tests and fits, each of which leaves what it counted.

usage: python process_cases.py FOLDER PROCESSES, where FOLDER holds the model and the data; writes FOLDER/PROCESSES/*.
"""

import json
import sys
from pathlib import Path
from typing import Any

import detection_cases
import torch
from helpers import quick_trainer
from lightning.pytorch import Callback, Trainer

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import FeatureGeometry, ResultsWriter, RobustEvaluation
from robustclip.methods import TeCoA

ATTACKS = {"linf": PGD(eps="8/255", alpha="4/255"), "l2": PGD(eps=1.0, alpha=0.5, norm="l2", keep="best")}


def tasks(folder: Path) -> dict[str, DataSource | str]:
    """Sizes that two does not divide, shares that are empty, one shard for several readers."""
    stream = f"wds:file://{folder}"
    return {
        "odd": "wds:odd",
        "single": "wds:single",
        "stream_odd": DataSource(f"{stream}/odd", name="stream_odd"),
        "stream_few": DataSource(f"{stream}/few", name="stream_few"),
        "stream_single": DataSource(f"{stream}/single", name="stream_single"),
        "broken": "wds:broken",
    }


def trainer(folder: Path, processes: int, *callbacks: Callback, **options: Any) -> Trainer:
    return quick_trainer(*callbacks, processes=processes, default_root_dir=folder, **options)


def data(folder: Path, **options: Any) -> CLIPDataModule:
    return CLIPDataModule(root=str(folder), image_size=32, batch_size=2, bad_samples="skip", **options)


def method(folder: Path) -> TeCoA:
    torch.manual_seed(0)
    return TeCoA(pretrained=str(folder / "model"), warmup_steps=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))


def run_test(folder: Path, processes: int, name: str, sets: list[DataSource | str], **options: Any) -> None:
    """Evaluates; rank 0 writes the results."""
    limit = options.pop("max_samples", None)
    callbacks = [RobustEvaluation(ATTACKS, max_samples=limit), ResultsWriter(str(folder / str(processes) / name))]
    callbacks.append(FeatureGeometry(max_samples=5))
    runner = trainer(folder, processes, *callbacks)
    runner.test(method(folder), datamodule=data(folder, test=sets, **options), verbose=False)


def run_fit(folder: Path, processes: int, name: str, train: DataSource | str, **options: Any) -> None:
    """Fits; every rank writes its weights and what the validation counted."""
    runner = trainer(folder, processes, RobustEvaluation(ATTACKS), max_epochs=2)
    model = method(folder)
    runner.fit(model, datamodule=data(folder, train=train, **options))
    target = folder / str(processes)
    target.mkdir(exist_ok=True)
    torch.save(model.state_dict(), target / f"{name}.{runner.global_rank}.pt")
    metrics = {key: float(value) for key, value in runner.callback_metrics.items() if key.startswith("val/")}
    (target / f"{name}.{runner.global_rank}.json").write_text(json.dumps(metrics))


def main(folder: Path, processes: int) -> None:
    sets = tasks(folder)
    run_test(folder, processes, "all", list(sets.values()))
    run_test(folder, processes, "workers", [sets["odd"], sets["stream_odd"], sets["stream_few"]], num_workers=2)
    run_test(folder, processes, "limited", [sets["odd"], sets["stream_odd"]], max_samples=3)
    run_test(folder, processes, "only_single", [sets["single"]])
    run_test(folder, processes, "only_stream_single", [sets["stream_single"]])
    detection_cases.run(folder, processes)
    run_fit(folder, processes, "fit", "wds:odd", val=["wds:single"])
    streamed = DataSource(f"wds:file://{folder}/odd", name="streamed", split="train", length=7)
    run_fit(folder, processes, "fit_stream", streamed, val=["wds:odd", "wds:single"], num_workers=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
