"""Validation and test steps of a method: logits in fp32, and clean accuracy by task."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from robustclip.methods._shared.clean_accuracy import (
    PREFIX,
    log_counts,
    pause_buffer_broadcasts,
    resume_buffer_broadcasts,
)
from robustclip.metrics import Top1
from robustclip.models.tf32 import tf32
from robustclip.types import Batch, Task, data_of


class EvaluationSteps(LightningModule, ABC):
    """The hooks by which Lightning validates and tests a method.

    Attributes:
        counts: accuracy of each task, by `PREFIX` and its name; empty where a `RobustEvaluation` counts.
    """

    counts: nn.ModuleDict

    @abstractmethod
    def answers(self, images: Tensor, task: str = "train", *, index: Tensor | None = None, draw: int = 0) -> Tensor:
        """Computes the logits ``(B, C)`` of the method with its test-time defence.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], or embeddings.
            task: name of the task.
            index: ``(B,)`` sample ids.
            draw: number of the draw of a random defence.
        """

    @abstractmethod
    def prepare(self, tasks: Sequence[Task]) -> None:
        """Builds the zero-shot classifiers of the tasks."""

    def on_validation_epoch_start(self) -> None:
        """Builds the zero-shot classifiers again, since the text side may have been trained."""
        pause_buffer_broadcasts(self)
        self.prepare(data_of(self.trainer).val_tasks)

    def on_test_epoch_start(self) -> None:
        """Builds the zero-shot classifiers of the test tasks."""
        self.prepare(data_of(self.trainer).test_tasks)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Updates the clean accuracy of a batch and returns its logits ``(B, C)``."""
        return self._evaluate(batch, data_of(self.trainer).val_tasks[dataloader_idx])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Updates the clean accuracy of a batch and returns its logits ``(B, C)``."""
        return self._evaluate(batch, data_of(self.trainer).test_tasks[dataloader_idx])

    def _evaluate(self, batch: Batch, task: Task) -> Tensor:
        in_fp32 = torch.autocast(self.device.type, enabled=False)  # evaluation is fp32 in any precision of the trainer
        with in_fp32, tf32(is_allowed=False), torch.inference_mode(False), torch.no_grad():
            # Clones, since a method may enable gradients, which tensors made in inference mode cannot have.
            logits = self.answers(batch.images.clone(), task.name, index=batch.index.clone())
        if (key := f"{PREFIX}{task.name}") in self.counts:  # empty where a `RobustEvaluation` counts
            cast(Top1, self.counts[key]).update(logits.argmax(-1) == batch.labels)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Logs the clean accuracy of every validation task as ``val/<task>/clean/...``."""
        log_counts(self, self.counts, "val")
        resume_buffer_broadcasts(self)

    def on_test_epoch_end(self) -> None:
        """Logs the clean accuracy of every test task as ``test/<task>/clean/...``."""
        log_counts(self, self.counts, "test")
