"""Rows of all processes, so that what follows is that of one large batch."""

from collections.abc import Callable
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed

from robustclip.methods.base import RobustMethod
from robustclip.models.layers import frozen
from robustclip.types import data_of


def of_all(module: LightningModule, rows: Tensor) -> Tensor:
    """``(B, ...)`` of every process in one ``(sum B, ...)``, with gradients; only the sizes B may differ.

    A loss over all rows on every process sends each row the sum of the processes' gradients, of which
    DistributedDataParallel takes the mean: a step is that of the whole batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    sizes = _of_each(module, torch.tensor(len(rows), device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    return torch.cat([each[:size] for each, size in zip(_of_each(module, padded), sizes, strict=True)])


def of_training_images(
    method: RobustMethod, summary: Callable[[Tensor], Tensor] = lambda features: features
) -> tuple[Tensor, Tensor, Tensor]:
    """The training images as the method sees them now, with the test transform, in any stage.

    Args:
        method: of which a trainer is known.
        summary: of unit features ``(B, D)``, ``(B, ...)``.

    Returns:
        Sample ids ``(N,)``, which rise, summaries ``(N, ...)`` and labels ``(N,)``, the same on all processes.
    """
    trainer = method.trainer
    with torch.no_grad(), torch.autocast(method.device.type, enabled=False):
        none = torch.empty(0, dtype=torch.int64, device=method.device)
        found = [(none, summary(method.clip.encode_text([""])[:0]), none)]  # a process may have no image
        with frozen(method):
            for batch in data_of(trainer).plain_train_dataloader():
                here = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                found.append((here.index, summary(method.image_features(here.images)), here.labels))
        index, summaries, labels = (of_all(method, torch.cat(parts)) for parts in zip(*found, strict=True))
        order = index.argsort()
        return index[order], summaries[order], labels[order]


def _of_each(module: LightningModule, tensor: Tensor) -> Tensor:
    """One row per process."""
    return cast(Tensor, module.all_gather(tensor, sync_grads=True)).view(-1, *tensor.shape)
