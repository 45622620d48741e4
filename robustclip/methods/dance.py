"""DANCE, domain adaptative neighbourhood clustering via entropy optimisation."""

import math
from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import NonNegative, Positive
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.models.heads import head_logits
from robustclip.objectives.losses import entropy
from robustclip.types import Batch


class DANCE(ContextAndNorms):
    """DANCE (Saito et al., NeurIPS 2020, https://arxiv.org/abs/2002.07953), a baseline of UEO.

    Each image moves towards its neighbours, other images or classes. The entropy of a prediction moves away from half
    of its maximum, unless it is close to that. The matrix ``F`` holds unit features of all N training images and of
    the C classes; an image's feature is that of its last batch, and the present batch has gradients. With predictions
    ``p_i = softmax(s cos(f_i, t))``, DANCE minimises:

        q_ij = exp(f_i F_j / tau) / sum_(k != i) exp(f_i F_k / tau),   j != i
        w mean_i H(q_i) - w mean_i (d_i if d_i > m else 0),   d_i = |H(p_i) - log(C) / 2|

    The bank of image features is indexed by sample id. It starts with the pre-trained model and the test transform, and
    is the same on all processes, whose batches count as one. A checkpoint holds it, in 4 N D bytes, so that a resumed
    fit equals an uninterrupted one. Gradient accumulation clusters each micro-batch alone, which is another loss. No
    labels are used.

    Departures from the authors' code: there is no labelled source domain and no cross-entropy on it, and classes are
    text features; predictions have the model's logit scale instead of ``tau``; an image is left out of its own ``q_i``,
    where the code gives it cosine -1; entropies are exact, where the code adds 1e-5 inside the logarithm; the code's
    bank starts at 0. `ContextAndNorms` defines the trained parameters and learning rates, so that baselines differ by
    their loss alone.

    Args:
        temperature: ``tau``.
        margin: ``m``.
        weight: ``w``.
        kwargs: arguments of `ContextAndNorms`.

    Raises:
        ValueError: the temperature is not positive.
    """

    training_arguments: tuple[str, ...] = ("temperature", "margin", "weight")

    def __init__(
        self, temperature: Positive = 0.05, margin: NonNegative = 0.5, weight: NonNegative = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.temperature, self.margin, self.weight = temperature, margin, weight
        self.bank = torch.empty(0)  # (N, D), row = sample id; zeros where no image has that id

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the neighbours' entropy, and minus the distance of the predictions' entropy from half its maximum."""
        features, classes = self.features(batch.images)
        features, index = all_gather_rows(self, features), all_gather_rows(self, batch.index)
        with torch.autocast(features.device.type, enabled=False):
            log_p = head_logits(features, classes, self.clip.logit_scale).log_softmax(1)
            terms = {
                "clustering": self.weight * entropy(self.log_neighbours(features, classes, index)).mean(),
                "separation": -self.weight * self.separation(log_p),
            }
        self.bank = self.bank.index_copy(0, index, features.detach())
        return terms

    def log_neighbours(self, features: Tensor, classes: Tensor, index: Tensor) -> Tensor:
        """Computes log-probabilities ``log q`` ``(B, N + C)`` that each image has a given neighbour.

        Args:
            features: ``(B, D)``, of unit length.
            classes: ``(C, D)``, of unit length.
            index: sample ids ``(B,)``.
        """
        ids = torch.arange(len(self.bank), device=index.device)
        is_out = (index[:, None] == ids) | ~self.bank.any(1)
        images = (features @ self.bank.T).index_copy(1, index, features @ features.T) / self.temperature
        images = images.masked_fill(is_out, torch.finfo(images.dtype).min)  # -inf would make the entropy nan
        return torch.cat([images, features @ classes.T / self.temperature], dim=1).log_softmax(1)

    def separation(self, log_p: Tensor) -> Tensor:
        """Computes the mean of ``d_i`` where it exceeds the margin, from log-probabilities ``(B, C)``."""
        distance = (entropy(log_p) - math.log(log_p.shape[1]) / 2).abs()
        return (distance * (distance > self.margin)).mean()

    def on_fit_start(self) -> None:
        """Fills the bank of image features, unless the checkpoint of a resumed fit has done so."""
        super().on_fit_start()
        if self.trainer.ckpt_path is not None and len(self.bank) > 0:
            self.bank = self.bank.to(self.device)
        else:
            self.bank = self.summarise_training_images(lambda images, _: images.float()).nan_to_num()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the bank of image features to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["bank"] = self.bank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the bank of image features from the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.bank = checkpoint.get("bank", torch.empty(0))
