"""Tip-Adapter and Tip-Adapter-F, a cache of the features of the training images."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Count, Positive
from robustclip.methods._shared.distributed import all_gather_rows, encode_training_images
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.methods._shared.saved_state import saved_classes
from robustclip.models.heads import head_logits
from robustclip.types import UNKNOWN, Batch, Task, data_of


class TipAdapter(FrozenFeatures):
    """Tip-Adapter-F, and Tip-Adapter without training (Zhang et al., ECCV 2022, https://arxiv.org/abs/2111.03930).

    Minimises the cross-entropy of:

        s x t^T + alpha exp(-beta (1 - x K^T)) V

    The keys ``K`` start as the unit features of the training images; ``V`` are their one-hot labels. Tip-Adapter-F
    trains ``K``, Tip-Adapter (``learns: false``, one epoch) does not. ``searches`` chooses ``alpha`` and ``beta``
    before each validation of a fit: the pair of the authors' grid with most correct predictions on held-out images of
    the training classes, whose accuracy is thereby too high. Checkpoints keep the pair. Tasks with the training classes
    use the cache, other tasks are zero-shot.

    Departure from the authors' code: a key is the image's feature under the test transform, not the mean over ten
    passes with random crops. CRoFT's code moreover mixes images in that mean, since its loader shuffles.

    Args:
        alpha: weight of the cache; CRoFT's comparison uses 1.17, and 1 for ``beta``, on ImageNet, else 1 and 10.
        beta: sharpness of the similarity with the keys.
        learns: train the keys; false leaves them as they start.
        searches: choose ``alpha`` and ``beta`` on held-out images.
        most: upper ends of the grid of ``alpha`` and ``beta``, which starts at 0.1; the authors' are 3 and 7 on
            ImageNet.
        steps: numbers of values of ``alpha`` and ``beta`` in the grid.
        kwargs: arguments of `FrozenFeatures`.

    Raises:
        ValueError: a number is not positive; or, in a fit that searches, no image of the training classes is held out.
    """

    training_arguments: tuple[str, ...] = ("learns", "searches", "most", "steps")
    keys: nn.Parameter | None
    key_labels: Tensor | None
    chosen: Tensor | None

    def __init__(
        self,
        alpha: Positive = 1.0,
        beta: Positive = 10.0,
        learns: bool = True,
        searches: bool = False,
        most: tuple[Positive, Positive] = (3.0, 7.0),
        steps: tuple[Count, Count] = (20, 200),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.alpha, self.beta, self.learns, self.searches = alpha, beta, learns, searches
        self.most, self.steps = most, steps
        self.register_buffer("chosen", None)  # alpha and beta of a search
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
        alpha, beta = (self.alpha, self.beta) if self.chosen is None else self.chosen.to(features.dtype)
        return zero_shot + alpha * self._votes(head_logits(features, self.keys), beta)

    def _votes(self, similarities: Tensor, beta: Tensor | float) -> Tensor:
        """Sums the keys' weights ``(B, C)`` of each class, for similarities ``(B, N)`` with the keys."""
        assert self.key_labels is not None
        # Column 0 of the one-hot labels belongs to UNKNOWN, the label of keys without an image, and is dropped.
        values = F.one_hot(self.key_labels - UNKNOWN, len(self.class_names) + 1)[:, 1:].to(similarities.dtype)
        return head_logits((beta * (similarities - 1)).exp(), values.T)

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

    @torch.no_grad()
    def search(self) -> None:
        """Chooses the first best ``alpha`` and ``beta`` on the validation images of the training classes."""
        assert self.keys is not None
        trainer, data = self.trainer, cast(Any, data_of(self.trainer))
        alphas, betas = (
            [0.1 + number * (most - 0.1) / steps for number in range(steps)]
            for most, steps in zip(self.most, self.steps, strict=True)
        )
        correct = torch.zeros(len(betas), len(alphas), dtype=torch.int64, device=self.device)
        for task, loader in zip(data.val_tasks, data.val_dataloader(), strict=True):
            for batch in loader if task.name in self.cached_tasks else ():
                here = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                features = self.image_features(here.images)
                zero_shot = head_logits(features, self.heads[task.name], self.clip.logit_scale)
                similarities = head_logits(features, self.keys)
                for row, beta in enumerate(betas):
                    votes = self._votes(similarities, beta)
                    predictions = torch.stack([(zero_shot + alpha * votes).argmax(-1) for alpha in alphas])
                    correct[row] += (predictions == here.labels).sum(-1)
        correct = all_gather_rows(self, correct[None]).sum(0).flatten()
        row, column = divmod(int((correct == correct.max()).nonzero()[0]), len(alphas))
        self.chosen = torch.tensor([alphas[column], betas[row]], device=self.device)

    # Lightning

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """Runs a training step; without training, returns None, which leaves out the optimiser."""
        return super().training_step(batch, batch_idx) if self.learns else None

    def on_validation_epoch_start(self) -> None:
        """Encodes the validation classes, and searches in a fit."""
        super().on_validation_epoch_start()
        if self.searches and self.trainer.state.fn == TrainerFn.FITTING:
            with torch.autocast(self.device.type, enabled=False):
                self.search()

    def setup(self, stage: str) -> None:
        """Allocates a key per training image; `on_fit_start` fills them, when the image tower is on its device."""
        if stage == "fit" and self.keys is None:
            data = data_of(self.trainer)
            count = len(data.plain_train_dataloader().dataset)  # type: ignore[arg-type]
            empty = torch.zeros(count, self.width), torch.full((count,), UNKNOWN)
            self.add_cache(data.train_task.class_names, *empty)
            self._is_empty = True
        super().setup(stage)
        if stage == "fit" and self.searches:
            names = [task.class_names for task in data_of(self.trainer).val_tasks if task.groups is None]
            if self.class_names not in names:
                raise ValueError(
                    "model.searches needs held-out images of the training classes; set data.holdout above 0"
                )

    def on_fit_start(self) -> None:
        """Fills a new cache in the order of the sample ids; undecodable images leave empty keys at its end."""
        if self._is_empty and self.keys is not None and self.key_labels is not None:
            _, features, labels = encode_training_images(self)
            with torch.no_grad():
                self.keys[: len(labels)] = features
                self.key_labels[: len(labels)] = labels
            self._is_empty = False
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of the cache's classes to the checkpoint.

        Raises:
            ValueError: `alpha` and `beta` were to be chosen, but no validation has run.
        """
        if self.searches and self.chosen is None:
            raise ValueError("model.searches chooses alpha and beta before a validation, and none has run; allow one")
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
        if "chosen" in checkpoint["state_dict"]:
            self.chosen = torch.zeros(2, device=self.clip.mean.device)
        self._is_empty = False
        super().on_load_checkpoint(checkpoint)
