"""What the tests of unsupervised methods share: a fit on images without labels, and class features written out."""

from pathlib import Path
from typing import Any

import method_cases as cases
import torch
from helpers import quick_trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.transforms import Augmentation
from robustclip.methods import RobustMethod
from robustclip.types import Batch

OPTIONS = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "context_lr": 0.05, "norm_filter": "all"}
STEPS = 4


def shapes(*, is_augmented: bool = False) -> CLIPDataModule:
    """Classes 0 to 4 of the shapes world are known; the images are of 2 to 6, so that those of 5 and 6 are unknown."""
    source = DataSource("shapes:source", classes="0-4", images="2-6")
    crops = Augmentation(scale=(0.5, 1.0), flip=True) if is_augmented else None
    return CLIPDataModule(
        train=source, batch_size=8, eval_batch_size=64, image_size=32, holdout=0.0, augmentation=crops
    )


class Looking(Callback):
    """Counts the labels that a fit has shown, and changes them first if wanted."""

    def __init__(self, *, is_changing: bool) -> None:
        self.is_changing, self.labels = is_changing, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: RobustMethod, batch: Batch, batch_idx: int) -> None:
        if self.is_changing:
            batch.labels.copy_((batch.labels + 1 + batch_idx) % 5)
        self.labels += batch.labels.tolist()


class Save(Callback):
    """Writes a checkpoint half-way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.path)


def fitted(method: Any, *callbacks: Callback, ckpt_path: Path | None = None, **data: bool) -> Any:
    trainer = quick_trainer(*callbacks, max_steps=STEPS, limit_val_batches=0)
    trainer.fit(method, datamodule=shapes(**data), ckpt_path=ckpt_path)
    return method


def learnt(method: RobustMethod) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in method.parameters() if parameter.requires_grad])


def class_features(twin: Any) -> Tensor:
    """Unit features ``(C, D)`` from the raw text tower, the context put into the table of embeddings."""
    prompts = twin.clip.tokenizer([f"a photo of a {name}." for name in cases.TASK.class_names])
    x = twin.clip.net.token_embedding(prompts)
    x = torch.cat([x[:, :1], twin.context.vectors.expand(len(x), -1, -1), x[:, 5:]], dim=1)
    net = twin.clip.net
    x = net.ln_final(net.transformer(x + net.positional_embedding, attn_mask=net.attn_mask))
    return cases.unit(x[range(len(x)), prompts.argmax(1)] @ net.text_projection)
