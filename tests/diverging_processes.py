"""Run by test_outcome.py: a fit on two ranks, one of which meets a loss that is not finite.

usage: python diverging_processes.py FOLDER, which holds the model; writes FOLDER/RANK.txt
"""

import sys
from functools import partial
from pathlib import Path

import torch
from helpers import quick_trainer
from ranks import on_all
from torch import Tensor
from torch.nn import functional as F

from robustclip.data import CLIPDataModule
from robustclip.methods import TeCoA
from robustclip.types import Batch


class Diverging(TeCoA):
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.logits(batch.images), batch.labels)
        return {"ce": loss / 0 if self.global_step == 2 and self.global_rank == 1 else loss}


def fit(folder: Path) -> None:
    trainer = quick_trainer(
        processes=2, max_steps=6, limit_val_batches=0, enable_checkpointing=True, default_root_dir=folder
    )
    method = Diverging(pretrained=str(folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.01))
    try:
        trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    except ValueError as error:
        (folder / f"{trainer.global_rank}.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_all(partial(fit, Path(sys.argv[1])))
