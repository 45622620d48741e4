"""FrozenFeatures, the base class of the methods that train parameters behind frozen towers."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import CountOrZero
from robustclip.methods._shared.schedules import check_end, constant_warmup_cosine
from robustclip.methods.base import RobustMethod
from robustclip.types import Batch, Task


class FrozenFeatures(RobustMethod):
    """Base of methods whose towers are frozen and in eval mode; they accept embeddings instead of images.

    A training batch is encoded once, in the trainer's precision; the rest of a step is small and in fp32. The defaults
    are those of CRoFT's code (https://github.com/LinLLLL/CRoFT, after CoOp's) for all its methods: the first epoch at
    the constant rate 1e-5, then a cosine that is updated every epoch. Its weight decay of 0.1, two hundred times
    CoOp's, shrinks adapters that start at the identity.

    Args:
        warmup_epochs: epochs at 1e-5 before the cosine.
        optimizer: function that builds the optimiser from `parameter_groups()`.
        kwargs: arguments of `RobustMethod`; with ``schedule`` ``constant``, there is no cosine after the warm-up.

    Raises:
        ValueError: the number of epochs is negative, or there is a warm-up in steps.
    """

    training_arguments: tuple[str, ...] = ("warmup_epochs",)
    takes_features = True
    is_tower_frozen = True

    def __init__(
        self,
        warmup_epochs: CountOrZero = 1,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=2e-3, momentum=0.9, weight_decay=0.1),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if self.warmup_steps:
            name = type(self).__name__
            raise ValueError(f"warmup_steps must be 0 for {name}, got {self.warmup_steps}; set warmup_epochs")
        self.warmup_epochs = warmup_epochs
        self._texts: dict[tuple[object, ...], Tensor] = {}
        self.width = self.clip.encode_text([""]).shape[1]  # width D of the embeddings
        self.train()

    def embeddings(self, images: Tensor) -> Tensor:
        """Embeds images ``(B, 3, H, W)`` in [0, 1] as ``(B, D)``, not normalised; embeddings are returned unchanged.

        There are no gradients in training mode, but in eval mode, so that attacks can use the tower.
        """
        if images.ndim == 2:
            return images
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            return self.clip.embed_image(images).to(self.clip.mean.dtype)

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1], or embeddings ``(B, D)``, as unit features ``(B, D)``."""
        return F.normalize(self.embeddings(images), dim=-1)

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their positions as unit features ``(B, D)`` and ``(B, P, D)``, behind the same layers."""
        whole, local = (part.to(self.clip.mean.dtype) for part in self.clip.embed_grid(images))
        return self.image_features(whole), self.image_features(local.flatten(0, 1)).view_as(local)

    def class_features(self, task: Task) -> Tensor:
        """Encodes the task's classes as unit features ``(C, D)``, once for the same class names and templates."""
        texts = task.class_names, task.templates, task.descriptions
        if texts not in self._texts:
            with torch.no_grad():
                self._texts[texts] = super().class_features(task)
        return self._texts[texts].to(self.clip.mean)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy on clean images."""
        return {"clean_ce": F.cross_entropy(self.logits(batch.images), batch.labels)}

    def embedded(self, batch: Batch) -> Batch:
        """Replaces the images of a batch by their embeddings ``(B, D)``."""
        return batch._replace(images=self.embeddings(batch.images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Embeds the images and runs `step` on them, in fp32."""
        embedded = self.embedded(batch)
        with torch.autocast(self.device.type, enabled=False):
            return self.step(embedded, batch_idx)

    def step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the training step on an embedded batch, and returns its loss.

        Args:
            batch: batch with embeddings ``(B, D)``.
            batch_idx: number of the batch in its epoch.
        """
        return super().training_step(batch, batch_idx)

    def schedule_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Builds a schedule that is updated every epoch, in the form of Lightning's configuration."""
        check_end(self.trainer, self.schedule)
        epochs = self.trainer.max_epochs if self.schedule == "cosine" else None
        scheduler = constant_warmup_cosine(optimizer, warmup_epochs=self.warmup_epochs, epochs=epochs)
        return {"scheduler": scheduler, "interval": "epoch"}

    def configure_optimizers(self) -> Any:
        """Builds the optimiser over `parameter_groups()` and its schedule, which is updated every epoch."""
        optimizer = self.optimizer(self.parameter_groups())
        return {"optimizer": optimizer, "lr_scheduler": self.schedule_of(optimizer)}
