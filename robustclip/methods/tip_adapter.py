"""Tip-Adapter-F, a trained cache of the features of the training images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Positive
from robustclip.methods._shared.distributed import of_training_images
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.methods._shared.saved_state import saved_classes
from robustclip.models.heads import head_logits
from robustclip.types import UNKNOWN, Task, data_of


class TipAdapter(FrozenFeatures):
    """Tip-Adapter-F (Zhang et al., ECCV 2022, https://arxiv.org/abs/2111.03930).

    Minimises the cross-entropy of::

        s x t^T + alpha exp(-beta (1 - x K^T)) V

    The keys ``K`` start as the unit features of the training images and are trained; ``V`` are their one-hot labels.
    Tasks with the training classes use the cache, other tasks are zero-shot.

    Departure from the authors' code: a key is the image's feature under the test transform, not the mean over ten
    passes with random crops. CRoFT's code moreover mixes images in that mean, since its loader shuffles.

    Args:
        alpha: weight of the cache; CRoFT's comparison uses 1.17, and 1 for ``beta``, on ImageNet, else 1 and 10.
        beta: sharpness of the similarity with the keys.
        kwargs: arguments of `FrozenFeatures`.

    Raises:
        ValueError: a number is not positive.
    """

    keys: nn.Parameter | None
    key_labels: Tensor | None

    def __init__(self, alpha: Positive = 1.0, beta: Positive = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.beta = alpha, beta
        self.class_names: tuple[str, ...] = ()
        self.register_parameter("keys", None)  # until a fit or a checkpoint defines their number
        self.register_buffer("key_labels", None)
        self.cached_tasks: set[str] = set()  # names of the tasks with the training classes
        self._is_empty = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the keys of the cache."""
        return [{"params": [] if self.keys is None else [self.keys]}]

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        """Computes logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1], or of embeddings ``(B, D)``."""
        features = self.image_features(images)
        zero_shot = head_logits(features, self.head(task), self.clip.logit_scale)
        if self.keys is None or self.key_labels is None or task not in self.cached_tasks:
            return zero_shot
        # Column 0 of the one-hot labels belongs to UNKNOWN, the label of keys without an image, and is dropped.
        values = F.one_hot(self.key_labels - UNKNOWN, len(self.class_names) + 1)[:, 1:].to(zero_shot.dtype)
        affinity = (self.beta * (head_logits(features, self.keys) - 1)).exp()
        return zero_shot + self.alpha * head_logits(affinity, values.T)

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Encodes the tasks' classes and records the tasks with the training classes."""
        super().prepare(tasks)
        same = {task.name for task in tasks if task.class_names == self.class_names and task.groups is None}
        self.cached_tasks |= same

    def add_cache(self, class_names: tuple[str, ...], keys: Tensor, labels: Tensor) -> None:
        """Stores the cache.

        Args:
            class_names: names of the ``C`` classes.
            keys: unit features ``(N, D)`` of the images.
            labels: ``(N,)``, or UNKNOWN for keys without an image.
        """
        self.class_names, self.keys, self.key_labels = class_names, nn.Parameter(keys.clone()), labels

    # Lightning

    def setup(self, stage: str) -> None:
        """Allocates a key per training image; `on_fit_start` fills them, when the image tower is on its device."""
        if stage == "fit" and self.keys is None:
            data = data_of(self.trainer)
            count = len(data.plain_train_dataloader().dataset)  # type: ignore[arg-type]
            empty = torch.zeros(count, self.width), torch.full((count,), UNKNOWN)
            self.add_cache(data.train_task.class_names, *empty)
            self._is_empty = True
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Fills a new cache in the order of the sample ids; undecodable images leave empty keys at its end."""
        if self._is_empty and self.keys is not None and self.key_labels is not None:
            _, features, labels = of_training_images(self)
            with torch.no_grad():
                self.keys[: len(labels)] = features
                self.key_labels[: len(labels)] = labels
            self._is_empty = False
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of the cache's classes to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cache_classes"] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Allocates the cache for the one that the checkpoint holds.

        Raises:
            ValueError: the cache's classes differ from those of this run's training set.
        """
        classes = saved_classes(checkpoint, "cache", None if self.keys is None else self.class_names)
        if classes and self.keys is None:
            state = checkpoint["state_dict"]
            parts = (state[name].to(self.clip.mean.device) for name in ("keys", "key_labels"))
            self.add_cache(classes, *parts)
        self._is_empty = False
        super().on_load_checkpoint(checkpoint)
