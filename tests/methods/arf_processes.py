"""Fits that test_arf.py runs in its own process, and as a script on two: the same batches, whole or shared out.

usage: python arf_processes.py FOLDER; writes FOLDER/NAME.PROCESSES.RANK.pt
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import quick_trainer
from lightning.pytorch import seed_everything
from ranks import on_all

from robustclip.data import CLIPDataModule
from robustclip.methods import ARF, FLYP, DiVE

IMAGES = 8
CASES: dict[str, tuple[type[FLYP], dict[str, Any]]] = {
    "even": (ARF, {}),
    "uneven": (ARF, {}),  # with an image that does not decode
    "cached": (ARF, {"micro_batch": 2}),
    "dive": (DiVE, {"average_weight": 1.0, "pair_weight": 1.0}),
}


def fit(folder: Path, processes: int, name: str) -> None:
    """Two steps, each over all images."""
    seed_everything(0, verbose=False)
    cls, options = CASES[name]
    method = cls(
        pretrained=str(folder / "model"),
        warmup_steps=0,
        schedule="constant",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        **options,
    )
    data = CLIPDataModule(
        "wds:uneven" if name == "uneven" else "wds:even",
        root=str(folder),
        image_size=32,
        global_batch_size=IMAGES,
        holdout=0,
        captions="captions.parquet",
        anchors="anchors",
    )
    trainer = quick_trainer(processes=processes, max_epochs=2, default_root_dir=folder)
    trainer.fit(method, datamodule=data)
    weights = {key: parameter.detach() for key, parameter in method.named_parameters() if parameter.requires_grad}
    logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    torch.save((weights, logged), folder / f"{name}.{processes}.{trainer.global_rank}.pt")


def main(folder: Path, processes: int) -> None:
    for name in CASES:
        fit(folder, processes, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_all(partial(main, Path(sys.argv[1]), 2))
