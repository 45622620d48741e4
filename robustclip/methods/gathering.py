"""Rows of all processes, so that a loss over the batch is that of one large batch."""

from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed


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


def _of_each(module: LightningModule, tensor: Tensor) -> Tensor:
    """One row per process."""
    return cast(Tensor, module.all_gather(tensor, sync_grads=True)).view(-1, *tensor.shape)
