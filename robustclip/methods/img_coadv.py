"""ImgCoAdv, contrastive adversarial training on images alone."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import CountOrZero, Positive
from robustclip.attacks import PGD, Attack
from robustclip.methods.base import RobustMethod
from robustclip.types import Batch


class ImgCoAdv(RobustMethod):
    """ImgCoAdv, a label-free baseline of TeCoA (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises InfoNCE between adversarial images and their clean copies, with the batch's other clean images as
    negatives: ``-log exp(cos(f(x'_i), f(x_i)) / tau) / sum_k exp(cos(f(x'_i), f(x_k)) / tau)``. ``x'_i`` maximises the
    same loss in the perturbation set (PGD, last iterate) against fixed clean features. Labels are not used. Over
    several processes, each uses its own negatives.

    The authors' code does not contain it. That clean copies are not augmented, that both sides get gradients, and the
    temperature are this project's interpretation.

    Args:
        temperature: ``tau``; 0.07 as in MoCo (https://arxiv.org/abs/1911.05722).
        attack: training attack.
        optimizer: default of TeCoA, SGD with momentum 0.9 and no weight decay.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: the temperature is 0 or less.
    """

    of_training: tuple[str, ...] = ("temperature",)

    def __init__(
        self,
        temperature: Positive = 0.07,
        attack: Attack = PGD(eps="1/255", alpha="1/255", steps=2),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
        warmup_steps: CountOrZero = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        self.temperature = temperature

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns InfoNCE of the adversarial images among the clean ones."""
        clean = self.image_features(batch.images)
        own = torch.arange(len(clean), device=clean.device)
        attacked = self.perturb(batch, forward=lambda images: self.similarities(images, clean.detach()), targets=own)
        return {"adversarial_infonce": F.cross_entropy(self.similarities(attacked, clean).float(), own)}

    def similarities(self, images: Tensor, keys: Tensor) -> Tensor:
        """Computes the cosine similarities of images and keys, divided by the temperature.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            keys: unit features ``(K, D)``.

        Returns:
            ``(B, K)``.
        """
        return self.image_features(images) @ keys.T / self.temperature
