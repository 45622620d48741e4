"""ImgCoAdv.: adversarial training on images alone."""

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
    """ImgCoAdv., a label-free baseline of TeCoA (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises InfoNCE between attacked images and their clean copies, the batch's other clean images being negatives:
    ``-log exp(cos(f(x'_i), f(x_i)) / tau) / sum_k exp(cos(f(x'_i), f(x_k)) / tau)``, where ``x'_i`` maximises the same
    loss in the ball (PGD, last iterate) against the clean features as they are. Labels are not used; over several
    processes the negatives are those of the own one.

    The authors' code does not have it. That the clean copies are not augmented, that both sides get gradients and the
    temperature are this project's reading.

    Args:
        temperature: ``tau``; 0.07 as in MoCo (https://arxiv.org/abs/1911.05722).
        attack: training attack.
        optimizer: TeCoA's, SGD with momentum 0.9 and no weight decay.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: a temperature of 0 or less.
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
        """InfoNCE of attacked images among the clean ones."""
        clean = self.image_features(batch.images)
        own = torch.arange(len(clean), device=clean.device)
        attacked = self.perturb(batch, forward=lambda images: self.similarities(images, clean.detach()), targets=own)
        return {"adversarial_infonce": F.cross_entropy(self.similarities(attacked, clean).float(), own)}

    def similarities(self, images: Tensor, keys: Tensor) -> Tensor:
        """Cosines ``(B, K)`` of images ``(B, 3, H, W)`` with unit features ``(K, D)``, over the temperature."""
        return self.image_features(images) @ keys.T / self.temperature
