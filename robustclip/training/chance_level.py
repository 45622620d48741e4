"""Warning about a fit whose loss is no better than guessing."""

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from robustclip.types import data_of

SHARE_OF_CHANCE = 0.97  # a loss above this share of log(C) is no better than guessing
MEMORY = 0.95  # weight of the past in the moving average: about twenty steps, so that the epoch's start has no effect


class ChanceLevelWarning(Callback):
    """Warns after an epoch that ends with a cross-entropy term at the chance level, ``log C`` for ``C`` classes.

    Robust accuracy can rise while a model collapses to guessing; such an accuracy is no result.
    """

    def __init__(self) -> None:
        self._averages: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the moving averages of the terms on the device, without waiting for it."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/") and name.endswith("_ce"):
                average = self._averages.get(name, value)
                self._averages[name] = MEMORY * average + (1 - MEMORY) * value

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the averages with the chance level, and warns."""
        chance = math.log(len(data_of(trainer).train_task.class_names))
        for name, average in self._averages.items():
            if not float(average) <= SHARE_OF_CHANCE * chance:
                warnings.warn(
                    f"epoch {trainer.current_epoch}: {name} ends at {float(average):.3f}, chance is {chance:.3f}:"
                    " the model has learnt nothing or collapsed; lower the learning rate or eps",
                    stacklevel=2,
                )
        self._averages.clear()
