"""Rows gathered from all processes, so that losses are those of one large batch."""

from collections.abc import Callable
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed

from robustclip.methods.base import RobustMethod
from robustclip.models.layers import frozen
from robustclip.types import data_of


def all_gather_rows(module: LightningModule, rows: Tensor) -> Tensor:
    """Gathers the rows of all processes, with gradients; only the numbers of rows may differ.

    If every process computes a loss over all rows, each row receives the sum of the processes' gradients. Since
    DistributedDataParallel takes the mean, a step equals that of the whole batch.

    Args:
        module: method with its trainer.
        rows: ``(B, ...)`` of this process.

    Returns:
        ``(sum B, ...)``, the same on all processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    sizes = _gathered_by_process(module, torch.tensor(len(rows), device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])  # all_gather needs one shape
    return torch.cat([part[:size] for part, size in zip(_gathered_by_process(module, padded), sizes, strict=True)])


def encode_training_images(
    method: RobustMethod, summary: Callable[[Tensor], Tensor] = lambda features: features
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes the training images with the present model and the test transform; this works in any stage.

    Args:
        method: method with its trainer.
        summary: function that is applied to unit features ``(B, D)``; it must return ``B`` rows.

    Returns:
        Sample ids ``(N,)`` in ascending order, summaries ``(N, ...)`` and labels ``(N,)``, the same on all processes.
    """
    trainer = method.trainer
    with torch.no_grad(), torch.autocast(method.device.type, enabled=False):
        none = torch.empty(0, dtype=torch.int64, device=method.device)
        # A process may have no image; its empty parts still need a shape and type, which an empty text provides.
        batches = [(none, summary(method.clip.encode_text([""])[:0]), none)]
        with frozen(method):
            for batch in data_of(trainer).plain_train_dataloader():
                here = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                batches.append((here.index, summary(method.image_features(here.images)), here.labels))
        index, summaries, labels = (all_gather_rows(method, torch.cat(parts)) for parts in zip(*batches, strict=True))
        order = index.argsort()
        return index[order], summaries[order], labels[order]


def _gathered_by_process(module: LightningModule, tensor: Tensor) -> Tensor:
    """Gathers a tensor from all processes, as one row per process."""
    return cast(Tensor, module.all_gather(tensor, sync_grads=True)).view(-1, *tensor.shape)
