"""DANCE: domain adaptative neighbourhood clustering via entropy optimisation."""

import math
from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import NonNegative, Positive
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import of_all
from robustclip.models.heads import head_logits
from robustclip.objectives.losses import entropy
from robustclip.types import Batch


class DANCE(ContextAndNorms):
    """DANCE (Saito et al., NeurIPS 2020, https://arxiv.org/abs/2002.07953), a baseline of UEO.

    Images move towards their neighbours, other images or classes, and the entropy of an answer away from half of its
    maximum, unless it is close to it. ``F`` holds unit features: of all N training images, each as in its last batch,
    those of the present batch with gradients; and of the C classes. With answers ``p_i = softmax(s cos(f_i, t))``::

        q_ij = exp(f_i F_j / tau) / sum_(k != i) exp(f_i F_k / tau),   j != i
        w mean_i H(q_i) - w mean_i (d_i if d_i > m else 0),   d_i = |H(p_i) - log(C) / 2|

    The bank of the images' features goes by sample id. It starts with the pre-trained model and the test transform and
    is the same on all processes, whose batches count as one. A checkpoint holds it, in 4 N D bytes, so that a resumed
    fit ends as an uninterrupted one. Gradient accumulation clusters piece by piece, another loss. No labels are read.

    Departures from the authors' code: there is no labelled source, whose cross-entropy is left out, and classes are
    text features; answers have the model's scale, where theirs have ``tau``; an image has no share in its own ``q_i``,
    where theirs has cosine -1; entropies are exact, where theirs add 1e-5 inside the logarithm; their bank starts at 0.
    `ContextAndNorms` says what learns, and at which rate, so that baselines differ by their loss alone.

    Args:
        temperature: ``tau``.
        margin: ``m``.
        weight: ``w``.
        kwargs: arguments of `ContextAndNorms`.

    Raises:
        ValueError: a temperature that is not positive.
    """

    of_training: tuple[str, ...] = ("temperature", "margin", "weight")

    def __init__(
        self, temperature: Positive = 0.05, margin: NonNegative = 0.5, weight: NonNegative = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.temperature, self.margin, self.weight = temperature, margin, weight
        self.bank = torch.empty(0)  # (N, D) by sample id, zeros where there is no such image

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Entropy among neighbours, and distance of the answers' entropy from half of its maximum."""
        features, classes = self.features(batch.images)
        features, index = of_all(self, features), of_all(self, batch.index)
        with torch.autocast(features.device.type, enabled=False):
            log_p = head_logits(features, classes, self.clip.logit_scale.float()).log_softmax(1)
            terms = {
                "clustering": self.weight * entropy(self.log_neighbours(features, classes, index)).mean(),
                "separation": -self.weight * self.separation(log_p),
            }
        self.bank = self.bank.index_copy(0, index, features.detach())
        return terms

    def log_neighbours(self, features: Tensor, classes: Tensor, index: Tensor) -> Tensor:
        """``log q`` ``(B, N + C)`` of features ``(B, D)`` with sample ids ``(B,)``, and of classes ``(C, D)``."""
        ids = torch.arange(len(self.bank), device=index.device)
        is_out = (index[:, None] == ids) | ~self.bank.any(1)
        images = (features @ self.bank.T).index_copy(1, index, features @ features.T) / self.temperature
        images = images.masked_fill(is_out, torch.finfo(images.dtype).min)  # an infinity is nan in the entropy
        return torch.cat([images, features @ classes.T / self.temperature], dim=1).log_softmax(1)

    def separation(self, log_p: Tensor) -> Tensor:
        """Mean of ``d_i`` where it exceeds the margin, of log-probabilities ``(B, C)``."""
        distance = (entropy(log_p) - math.log(log_p.shape[1]) / 2).abs()
        return (distance * (distance > self.margin)).mean()

    def on_fit_start(self) -> None:
        """Fills the bank, unless the checkpoint of a resumed fit has."""
        super().on_fit_start()
        if self.trainer.ckpt_path is not None and len(self.bank) > 0:
            self.bank = self.bank.to(self.device)
        else:
            self.bank = self.of_every_image(lambda images, _: images.float()).nan_to_num()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the bank."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bank"] = self.bank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the checkpoint's bank."""
        super().on_load_checkpoint(checkpoint)
        self.bank = checkpoint.get("bank", torch.empty(0))
