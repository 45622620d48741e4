"""Tip-Adapter-F: the training images as a cache that learns."""

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

    Minimises cross-entropy of::

        s x t^T + alpha exp(-beta (1 - x K^T)) V

    where the keys ``K`` start as the unit features of the training images and learn, and ``V`` are their labels,
    one-hot. Tasks with the training classes ask the cache, others are zero-shot.

    Departure from the authors' code: a key is the image's feature under the test transform, not the mean over ten
    passes with random crops, where CRoFT's code moreover mixes images, since its loader shuffles.

    Args:
        alpha: weight of the cache; CRoFT's comparison takes 1.17 and 1 for ``beta`` on ImageNet, else 1 and 10.
        beta: sharpness of its keys.
        kwargs: arguments of `FrozenFeatures`.

    Raises:
        ValueError: a number that is not positive.
    """

    keys: nn.Parameter | None
    key_labels: Tensor | None

    def __init__(self, alpha: Positive = 1.0, beta: Positive = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.beta = alpha, beta
        self.class_names: tuple[str, ...] = ()
        self.register_parameter("keys", None)  # until a fit or a checkpoint tells how many
        self.register_buffer("key_labels", None)
        self.asked: set[str] = set()  # heads of the training classes
        self._is_empty = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The keys."""
        return [{"params": [] if self.keys is None else [self.keys]}]

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        """Logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1], or of their embeddings ``(B, D)``."""
        features = self.image_features(images)
        zero_shot = head_logits(features, self.heads[task], self.clip.logit_scale)
        if self.keys is None or self.key_labels is None or task not in self.asked:
            return zero_shot
        # Row 0 is of keys without an image, whose label is UNKNOWN.
        values = F.one_hot(self.key_labels - UNKNOWN, len(self.class_names) + 1)[:, 1:].to(features.dtype)
        return zero_shot + self.alpha * (-self.beta * (1 - features @ self.keys.T)).exp() @ values

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Remembers which tasks have the training classes."""
        super().prepare(tasks)
        self.asked |= {task.name for task in tasks if task.class_names == self.class_names and task.groups is None}

    def add_cache(self, class_names: tuple[str, ...], keys: Tensor, labels: Tensor) -> None:
        """Keeps unit features ``(N, D)`` with labels ``(N,)``."""
        self.class_names, self.keys, self.key_labels = class_names, nn.Parameter(keys.clone()), labels

    # Lightning

    def setup(self, stage: str) -> None:
        """Makes room for a key of every training image; the image tower is not on its device yet."""
        if stage == "fit" and self.keys is None:
            data = data_of(self.trainer)
            count = len(data.plain_train_dataloader().dataset)  # type: ignore[arg-type]
            empty = torch.zeros(count, self.width), torch.full((count,), UNKNOWN)
            self.add_cache(data.train_task.class_names, *empty)
            self._is_empty = True
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Fills a new cache, in the order of the sample ids; images that do not decode leave room at its end."""
        if self._is_empty and self.keys is not None and self.key_labels is not None:
            _, features, labels = of_training_images(self)
            with torch.no_grad():
                self.keys[: len(labels)] = features
                self.key_labels[: len(labels)] = labels
            self._is_empty = False
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which classes the cache tells apart."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cache_classes"] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's cache.

        Raises:
            ValueError: it is of other classes than this run's training set.
        """
        classes = saved_classes(checkpoint, "cache", None if self.keys is None else self.class_names)
        if classes and self.keys is None:
            state = checkpoint["state_dict"]
            parts = (state[name].to(self.clip.mean.device) for name in ("keys", "key_labels"))
            self.add_cache(classes, *parts)
        self._is_empty = False
        super().on_load_checkpoint(checkpoint)
