"""Methods whose text side learns under attack; as a script, one fit of each on two processes.

usage: python text_cases.py FOLDER; writes FOLDER/CASE.RANK.pt.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import quick_trainer
from ranks import on_all
from torch import Tensor
from torch.nn import functional as F
from update_cases import FirstStep

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod, TeCoA
from robustclip.models.context import LearnableContext
from robustclip.types import Batch, Task


class TrainedContext(RobustMethod):
    """Adversarial prompt tuning: a context learns on images that are attacked through it (Li et al., CVPR 2024)."""

    pretrained_prefixes = ("clip.net.", "context.")
    is_tower_frozen = True

    def __init__(self, tokens: int = 4, phrase: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.context = LearnableContext(self.clip, phrase, tokens=tokens)
        self.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.context.vectors]}]

    def class_features(self, task: Task) -> Tensor:
        return self.context.encode(self.clip, self.context.tokenize(self.clip, task.class_names))

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"adversarial_ce": F.cross_entropy(self.logits(self.perturb(batch)), batch.labels)}


class BothTowers(TeCoA):
    """TeCoA that names every parameter but the logit scale."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [each for name, each in self.clip.named_parameters() if "logit_scale" not in name]}]


CASES: dict[str, type[RobustMethod]] = {"context": TrainedContext, "both": BothTowers}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fit(name: str, *, processes: int = 1) -> Tensor:
    """Takes two steps of eight images; returns how the first changed what learns."""
    torch.manual_seed(1)
    method = CASES[name](
        pretrained="shapes", attack=PGD(eps="8/255", alpha="2/255", steps=2), warmup_steps=0, optimizer=sgd
    )
    first = FirstStep()
    data = CLIPDataModule("shapes:source", shots=1, batch_size=8 // processes, image_size=32)
    trainer = quick_trainer(first, processes=processes, max_steps=2, limit_val_batches=0)
    trainer.fit(method, datamodule=data)
    assert first.update is not None
    return first.update


def main(folder: Path) -> None:
    for name in CASES:
        torch.save(fit(name, processes=2), folder / f"{name}.{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_all(partial(main, Path(sys.argv[1])))
