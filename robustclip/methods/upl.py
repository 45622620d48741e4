"""UPL: unsupervised prompt learning from the surest answers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import of_all
from robustclip.types import Batch


class UPL(ContextAndNorms):
    """UPL (Huang, Chu and Wei, 2022, https://arxiv.org/abs/2204.03649), a baseline of UEO.

    The zero-shot model answers once for every training image. Of each class, the images that it is surest of keep the
    answer as their label, and cross-entropy is minimised on them. The other images of a batch do not count.

    Departures from the authors' code: `ContextAndNorms` says what learns, and at which rate, so that baselines differ
    by their loss alone; theirs is a random context of 16 tokens at 2e-3. Batches are of all images, where theirs are of
    those that have a label.

    Args:
        per_class: number of images that keep their answer.
        kwargs: arguments of `ContextAndNorms`.

    Raises:
        ValueError: fewer than one image per class.
    """

    of_training: tuple[str, ...] = ("per_class",)

    def __init__(self, per_class: Count = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_class, self.pseudo_labels = per_class, torch.empty(0, dtype=torch.int64)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with the answers, on the images that have kept one."""
        labels = self.pseudo_labels[batch.index].float()
        rows = of_all(self, torch.cat([self.log_probabilities(batch.images), labels[:, None]], dim=1))
        log_p, labels = rows[:, :-1], rows[:, -1].long()
        return {"pseudo_ce": F.nll_loss(log_p, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(1)}

    def on_fit_start(self) -> None:
        """Answers for the training images."""
        super().on_fit_start()
        scale = self.clip.logit_scale
        answers = self.of_every_image(
            lambda images, classes: torch.stack((scale * (images @ classes.T)).softmax(1).max(1), dim=1)
        )
        certainties, classes = answers[:, 0].nan_to_num(-1.0), answers[:, 1].nan_to_num(-1.0).long()
        self.pseudo_labels = torch.full_like(classes, -1)
        for label in range(int(classes.max()) + 1):
            (images,) = torch.where(classes == label)
            surest = images[certainties[images].argsort(descending=True, stable=True)[: self.per_class]]
            self.pseudo_labels[surest] = label
