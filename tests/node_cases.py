"""Run by test_nodes.py under torchrun: commands of robustclip, one after the other, on a node that may be lost.

usage: torchrun ... node_cases.py COMMANDS, a JSON file with a list of command lines.

The variable STRIKE, such as ``fit 5`` or ``test 0.2``, tells when the second node dies: in a step of the fit, or in a
batch of a test set. ``signal 5`` sends SLURM's signal to every process in that step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from robustclip.cli.main import run


class Strike(Callback):
    """Kills this process and the agent of torchrun that has started it, as the loss of a node does."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._strike(f"fit {trainer.global_step}")
        if os.environ.get("STRIKE") == f"signal {trainer.global_step}":  # the queue sends it to all tasks
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_test_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._strike(f"test {dataloader_idx}.{batch_idx}")

    def _strike(self, moment: str) -> None:
        if os.environ.get("STRIKE") == moment and os.environ.get("GROUP_RANK") == "1":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["robustclip", *words]
        if status := run():
            sys.exit(status)
