"""ImgCoAdv, contrastive adversarial training on images alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Positive
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.methods._shared.tecoa_recipe import TeCoARecipe
from robustclip.models.heads import head_logits
from robustclip.types import Batch


class ImgCoAdv(TeCoARecipe):
    """ImgCoAdv, a label-free baseline of TeCoA (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises InfoNCE between adversarial images and their clean copies, with the batch's other clean images as
    negatives: ``-log exp(cos(f(x'_i), f(x_i)) / tau) / sum_k exp(cos(f(x'_i), f(x_k)) / tau)``. ``x'_i`` maximises the
    same loss in the perturbation set (PGD, last iterate) against fixed clean features. Labels are not used. The clean
    images of all processes are negatives.

    The authors' code does not contain it. That clean copies are not augmented, that both sides get gradients, and the
    temperature are this project's interpretation.

    Args:
        temperature: ``tau``; 0.07 as in MoCo (https://arxiv.org/abs/1911.05722).
        kwargs: arguments of `TeCoARecipe`.

    Raises:
        ValueError: the temperature is 0 or less.
    """

    training_arguments: tuple[str, ...] = ("temperature",)

    def __init__(self, temperature: Positive = 0.07, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns InfoNCE of the adversarial images among the clean ones."""
        clean = all_gather_rows(self, self.image_features(batch.images))
        ranks = all_gather_rows(self, torch.full_like(batch.labels, self.global_rank))
        own = (ranks == self.global_rank).nonzero().flatten()  # places of this process's images among all
        attacked = self.perturb(batch, forward=lambda images: self.similarities(images, clean.detach()), targets=own)
        return {"adversarial_infonce": F.cross_entropy(self.similarities(attacked, clean), own)}

    def similarities(self, images: Tensor, keys: Tensor) -> Tensor:
        """Computes the cosine similarities ``(B, K)`` of images and keys, divided by the temperature.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            keys: unit features ``(K, D)``.
        """
        return head_logits(self.image_features(images), keys, 1 / self.temperature)
