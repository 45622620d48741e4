"""A run that learns nothing should say so."""

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

SHARE_OF_CHANCE = 0.97  # a mean loss above this share of log(C) is no better than guessing


class ChanceLevelWarning(Callback):
    """Warns after an epoch whose cross-entropy terms stayed at the chance level, ``log C`` for ``C`` classes.

    Robust accuracy can rise while a model collapses to guessing; that is no result.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the means anew."""
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds up on the device, without waiting for it."""
        self._batches += 1
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/") and name.endswith("_ce"):
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the means with chance."""
        chance = math.log(len(trainer.datamodule.train_task.class_names))  # type: ignore[attr-defined]
        for name, total in self._sums.items():
            mean = float(total) / self._batches
            if not mean <= SHARE_OF_CHANCE * chance:
                warnings.warn(
                    f"epoch {trainer.current_epoch}: {name} is {mean:.3f} on average, chance is {chance:.3f}:"
                    " the model has learnt nothing or collapsed; lower the learning rate or eps",
                    stacklevel=2,
                )
