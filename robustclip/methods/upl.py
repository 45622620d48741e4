"""UPL, unsupervised prompt learning from the most confident predictions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.types import Batch


class UPL(ContextAndNorms):
    """UPL (Huang, Chu and Wei, 2022, https://arxiv.org/abs/2204.03649), a baseline of UEO.

    The zero-shot model predicts a class for every training image once. The most confident images of each class keep the
    prediction as their pseudo-label, and cross-entropy is minimised on them. Other images of a batch do not contribute.

    Departures from the authors' code: `ContextAndNorms` defines the trained parameters and learning rates, so that
    baselines differ by their loss alone; the code trains a random context of 16 tokens at 2e-3. Batches contain all
    images, where the code's contain those with a pseudo-label.

    Args:
        per_class: number of pseudo-labelled images per class.
        kwargs: arguments of `ContextAndNorms`.

    Raises:
        ValueError: there is less than one image per class.
    """

    training_arguments: tuple[str, ...] = ("per_class",)

    def __init__(self, per_class: Count = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_class, self.pseudo_labels = per_class, torch.empty(0, dtype=torch.int64)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy with the pseudo-labels, on the images that have one."""
        labels = self.pseudo_labels[batch.index].float()
        rows = all_gather_rows(self, torch.cat([self.log_probabilities(batch.images), labels[:, None]], dim=1))
        log_p, labels = rows[:, :-1], rows[:, -1].long()
        return {"pseudo_ce": F.nll_loss(log_p, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(1)}

    def on_fit_start(self) -> None:
        """Predicts the training images and keeps the most confident predictions of each class as pseudo-labels."""
        super().on_fit_start()
        scale = self.clip.logit_scale
        predictions = self.summarise_training_images(
            lambda images, classes: torch.stack((scale * (images @ classes.T)).softmax(1).max(1), dim=1)
        )
        confidences, classes = predictions[:, 0].nan_to_num(-1.0), predictions[:, 1].nan_to_num(-1.0).long()
        self.pseudo_labels = torch.full_like(classes, -1)
        for label in range(int(classes.max()) + 1):
            (images,) = torch.where(classes == label)
            most_confident = images[confidences[images].argsort(descending=True, stable=True)[: self.per_class]]
            self.pseudo_labels[most_confident] = label
