"""Optimiser steps of every method, on one process, or on several as a script: see test_big_batch.py.

usage: python update_cases.py FOLDER PROCESSES; writes FOLDER/CASE.PROCESSES.RANK.pt.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from helpers import quick_trainer, tiny_clip
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import on_all
from torch import Tensor

from robustclip.attacks import APGD, PGD, Attack, Square
from robustclip.data import CLIPDataModule
from robustclip.methods import (
    AGFT,
    APT,
    CAW,
    DANCE,
    FAP,
    FARE,
    FLYP,
    FLYPCE,
    PMGAFT,
    POUF,
    TRADES,
    UCAT,
    UEO,
    UPL,
    AdversarialTraining,
    CleanFineTuning,
    CLIPAdapter,
    CoOp,
    CRoFT,
    FineTuning,
    ImgCoAdv,
    RobustMethod,
    TeCoA,
    TipAdapter,
)
from robustclip.methods._shared.weight_perturbation import AWP
from robustclip.models.lora import LoRA
from robustclip.types import Batch

BATCH, PIECES = 8, 2
RATE = 0.1  # an update of a few per cent of the weights, far above the rounding of their sum
SMALLER = {"optimizer": lambda params: torch.optim.SGD(params, lr=RATE / 10)}  # at RATE, the second step diverges
LARGER = {"optimizer": lambda params: torch.optim.SGD(params, lr=50 * RATE)}
BEHIND_THE_TOWER = {"warmup_epochs": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=50 * RATE)}
BOX = PGD(eps="8/255", alpha="2/255", steps=3)
DECOMPOSABLE: dict[str, tuple[type[RobustMethod], dict[str, Any]]] = {
    "clean": (CleanFineTuning, {}),
    "tecoa": (TeCoA, {"attack": BOX}),
    "tecoa-lora": (TeCoA, {"attack": BOX, "lora": LoRA(rank=2), **LARGER}),
    "tecoa-l2": (TeCoA, {"attack": PGD(eps=0.5, alpha=0.2, steps=3, norm="l2")}),
    "tecoa-apgd": (TeCoA, {"attack": APGD(eps="8/255", steps=3)}),
    "tecoa-square": (TeCoA, {"attack": Square(eps="8/255", queries=5)}),
    "tecoa-start-only": (TeCoA, {"attack": PGD(eps="8/255", steps=0)}),
    "linear": (AdversarialTraining, {"attack": BOX, "head_lr": RATE}),
    "cosine": (AdversarialTraining, {"attack": BOX, "head_lr": RATE, "head": "cosine"}),
    "trades": (TRADES, {"attack": BOX}),
    "fare": (FARE, {"attack": BOX, "optimizer": lambda params: torch.optim.SGD(params, lr=RATE / 1000)}),
    "clip_adapter": (CLIPAdapter, BEHIND_THE_TOWER),
    "coop": (CoOp, {"tokens": 4, **BEHIND_THE_TOWER}),
    "apt": (APT, {"tokens": 4, "attack": BOX, **BEHIND_THE_TOWER}),
    "fap": (FAP, {"depth": 1, "attack": BOX, **BEHIND_THE_TOWER}),
    "fine_tuning": (FineTuning, {}),
    "flyp_ce": (FLYPCE, {}),
    "tip_adapter": (TipAdapter, BEHIND_THE_TOWER),
    "agft": (AGFT, {"attack": BOX}),
    "caw": (CAW, {"attack": BOX}),
    "ucat": (UCAT, {"attack": BOX}),
    "pmg_aft": (PMGAFT, {"attack": BOX}),
    "pmg_aft-block": (PMGAFT, {"attack": BOX, "layer": -1, "distance": "l2", "detach_clean": True}),
}
OF_THE_WHOLE: dict[str, tuple[type[RobustMethod], dict[str, Any]]] = {
    "img_coadv": (ImgCoAdv, {"attack": BOX}),
    "ueo": (UEO, {"weight_temperature": "msp", "context_lr": RATE}),
    "pouf": (POUF, {"context_lr": RATE}),
    "dance": (DANCE, {"context_lr": RATE, "weight": 5.0}),
    "upl": (UPL, {"context_lr": RATE}),
    "flyp": (FLYP, {}),
    "tecoa-awp": (TeCoA, {"attack": BOX, "awp": AWP(0.02)}),
    "apt-perturbed": (APT, {"tokens": 4, "attack": BOX, "strategy": "perturbed", **BEHIND_THE_TOWER}),
    "croft": (CRoFT, BEHIND_THE_TOWER),
    "croft-official": (CRoFT, {"mode": "official", **BEHIND_THE_TOWER}),
}
OTHER: dict[str, tuple[type[RobustMethod], dict[str, Any]]] = {
    "pmg_aft-sum": (PMGAFT, {"attack": BOX, "reduction": "sum", **SMALLER}),
    "pmg_aft-sum-weighted": (PMGAFT, {"attack": BOX, "reduction": "sum", "alpha": PIECES, "beta": PIECES, **SMALLER}),
}
CASES = DECOMPOSABLE | OF_THE_WHOLE | OTHER
IN_TURNS = ("croft", "croft-official")  # these have an optimiser for each turn, and do not accumulate


class Watched:
    """An attack that keeps the images that it has made, by step and sample id."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.images: dict[tuple[int, int], Tensor] = {}

    def __call__(self, *args: Any, index: Tensor, seed: int, **kwargs: Any) -> Tensor:
        attacked = self.attack(*args, index=index, seed=seed, **kwargs)
        self.images |= {(seed, number): image for number, image in zip(index.tolist(), attacked, strict=True)}
        return attacked


class FirstStep(Callback):
    """Keeps the batches of the first optimiser step, and how it changed what learns."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.update: Tensor | None = None
        self._start = torch.empty(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = learned(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        if self.update is None:
            self.batches.append(batch)
            self.update = learned(pl_module) - self._start if trainer.global_step else None


def learned(method: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.parameters() if p.requires_grad])


def frozen_tensors(method: RobustMethod) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in method.named_parameters() if not p.requires_grad}
    return {name: tensor.clone() for name, tensor in {**parameters, **dict(method.named_buffers())}.items()}


def build(name: str, **options: Any) -> RobustMethod:
    """The method of a case, with an image tower that has left its teacher; a random head is drawn from a fixed seed."""
    cls, kwargs = CASES[name]
    defaults = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=RATE)}
    with TemporaryDirectory() as folder:  # FAP's prompts are in the blocks of transformers
        pretrained = str(tiny_clip(Path(folder))) if cls is FAP else "shapes"
        torch.manual_seed(1)
        method = cls(pretrained=pretrained, **{**defaults, **kwargs, **options})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.clip.net.visual.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return method


def fit(name: str, *, processes: int = 1, pieces: int = 1, **options: Any) -> dict[str, Any]:
    """Two steps of `BATCH` images each, seen ``BATCH / processes / pieces`` at a time; the first is looked at.

    The configuration of the data is the same for any number of processes and pieces.

    The second is there because DistributedDataParallel complains in it of parameters without gradient.
    """
    method, first = build(name, **options), FirstStep()
    if method.attack is not None:
        method.attack = Watched(method.attack)  # type: ignore[assignment]
    limits: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": pieces}
    if processes > 1 and name in IN_TURNS:
        limits["strategy"] = "ddp_find_unused_parameters_true"
    trainer = quick_trainer(first, processes=processes, **limits)
    method.freeze_untrained()
    before = frozen_tensors(method)
    data = CLIPDataModule("shapes:source", shots=1, global_batch_size=BATCH, eval_batch_size=256, image_size=32)
    trainer.fit(method, datamodule=data)
    after = frozen_tensors(method)
    return {
        "update": first.update,
        "batches": first.batches,
        "attacked": {} if method.attack is None else method.attack.images,
        "moved": [key for key, tensor in before.items() if not torch.equal(tensor, after[key])],
        "stray": [key for key, p in method.named_parameters() if not p.requires_grad and p.grad is not None],
        "bank": method.bank if isinstance(method, DANCE) else None,
        "rank": trainer.global_rank,
    }


def main(folder: Path, processes: int) -> None:
    for name in CASES:
        result = fit(name, processes=processes)
        result["batches"] = [tuple(batch) for batch in result["batches"]]
        torch.save(result, folder / f"{name}.{processes}.{result['rank']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[2])
    on_all(partial(main, Path(sys.argv[1]), count), count)
