"""A test with unknown classes, which test_detection.py runs in its own process and process_cases.py in one and two."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers import ShardWriter, run_test, tiny_clip

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import OODDetection, ResultsWriter, RobustEvaluation
from robustclip.methods import TeCoA
from robustclip.objectives.scores import SCORES

ATTACK = PGD(eps="8/255", alpha="4/255", steps=3, keep="best")
CLASSES = ("red", "green", "blue", "black", "white")
KNOWN = "0-2"
TRAIN: Any = {"train": DataSource("wds:mixed", known=3, shift="open"), "holdout": 0.25}
NAME = "detection"  # of the folder


def write_all(folder: Path, write_shards: ShardWriter) -> Path:
    """The tiny model, and three sets; returns the folder.

    9 known and 6 unknown samples in `mixed`; of the other two sets, one each: a second process has none. Of the
    training images of `mixed` 11 show known classes, of which a hold-out of a quarter leaves 8, and 3 another.
    """
    (folder / "model").mkdir()
    tiny_clip(folder / "model")
    write_shards(folder, "mixed", "train", [9, 8], CLASSES, seed=7)
    for seed, (name, count) in enumerate({"mixed": 15, "lone_known": 1, "lone_unknown": 4}.items()):
        write_shards(folder, name, "test", [count], CLASSES, seed=seed)
    return folder


def data(folder: Path, *, test: list[str], unknown: list[str], **options: Any) -> CLIPDataModule:
    """Of each set the first three classes are known; one image per batch, whose scores no neighbour changes."""
    return CLIPDataModule(
        test=[DataSource(f"wds:{name}", classes=KNOWN) for name in test],
        unknown=[DataSource(f"wds:{name}", classes=KNOWN) for name in unknown],
        root=str(folder), image_size=32, batch_size=1, **options,
    )  # fmt: skip


def method(folder: Path) -> TeCoA:
    """With fine-tuned weights, so that nothing is the pre-trained model's by accident."""
    torch.manual_seed(0)
    found = TeCoA(pretrained=str(folder / "model"))
    with torch.no_grad():
        for parameter in found.clip.net.visual.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return found


def run(folder: Path, processes: int) -> None:
    """Every rank writes what it has logged, and rank 0 the result."""
    callbacks = [
        OODDetection(scores=[*SCORES, "knn"], attack=ATTACK, attacked=["mcm", "energy"]),
        RobustEvaluation(),
        ResultsWriter(str(folder / str(processes)), name=NAME),
    ]
    sets = data(folder, test=["mixed", "lone_known"], unknown=["mixed", "lone_unknown"], **TRAIN)
    trainer = run_test(method(folder), sets, *callbacks, processes=processes, default_root_dir=folder)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/detection/" in name}
    (folder / str(processes) / f"{NAME}.{trainer.global_rank}.json").write_text(json.dumps(metrics))
