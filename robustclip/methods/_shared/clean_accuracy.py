"""Clean accuracy of every task over all processes, and the broadcasts that an evaluation pauses."""

from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robustclip.metrics import Top1

PREFIX = "task_"  # keeps a task called `keys` or `type` from shadowing ModuleDict's attributes


def log_counts(module: LightningModule, counts: nn.ModuleDict, stage: str) -> None:
    """Logs ``<stage>/<task>/n``, ``<stage>/<task>/clean/...`` and ``<stage>/mean/clean/acc1``, and resets the metrics.

    Args:
        module: method that logs.
        counts: one `Top1` per task; the key is the task's name behind `PREFIX`.
        stage: ``val`` or ``test``.
    """
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


def pause_buffer_broadcasts(module: LightningModule) -> None:
    """Broadcasts the buffers once more and then no longer, so that ranks may evaluate different numbers of batches.

    DistributedDataParallel broadcasts buffers in every forward pass, which would wait for ranks whose share is empty.
    """
    if isinstance(wrapper := module.trainer.model, DistributedDataParallel):
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
        wrapper.require_forward_param_sync = False


def resume_buffer_broadcasts(module: LightningModule) -> None:
    """Lets DistributedDataParallel broadcast buffers in every forward pass again, after an evaluation."""
    if isinstance(wrapper := module.trainer.model, DistributedDataParallel):
        wrapper.require_forward_param_sync = True
