"""Counts of clean answers over tasks and processes."""

from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robustclip.metrics import Top1

PREFIX = "task_"  # keeps a task called `keys` or `type` from shadowing ModuleDict's attributes


def log_counts(module: LightningModule, counts: nn.ModuleDict, stage: str) -> None:
    """Logs ``<stage>/<task>/n``, ``<stage>/<task>/clean/...`` and ``<stage>/mean/clean/acc1``, and starts anew."""
    accuracies = []
    for key, count in counts.items():
        values = cast(Top1, count).compute()
        cast(Top1, count).reset()
        accuracies.append(values["acc1"])
        prefix = f"{stage}/{key.removeprefix(PREFIX)}"
        module.log_dict({f"{prefix}/n": values["n"].float(), f"{prefix}/clean/correct": values["correct"].float()})
        module.log(f"{prefix}/clean/acc1", values["acc1"], prog_bar=stage == "val")
    if accuracies:
        module.log(f"{stage}/mean/clean/acc1", torch.stack(accuracies).mean())


def synchronise_forwards(module: LightningModule, *, is_on: bool) -> None:
    """Lets ranks evaluate different numbers of batches while fitting.

    DistributedDataParallel broadcasts buffers in a forward pass, in which a rank with an empty share takes no part.
    """
    wrapper = module.trainer.model
    if isinstance(wrapper, DistributedDataParallel):
        if not is_on:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)
        wrapper.require_forward_param_sync = is_on
