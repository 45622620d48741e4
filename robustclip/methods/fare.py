"""FARE: robust embeddings without labels."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from robustclip.arguments import CountOrZero
from robustclip.attacks import PGD, Attack
from robustclip.methods.base import RobustMethod
from robustclip.models.teacher import ImageTeacher
from robustclip.types import Batch


class FARE(RobustMethod):
    """FARE (Schlarmann et al., ICML 2024, https://arxiv.org/abs/2402.12336).

    Minimises ``||phi(x') - phi_0(x)||_2^2``, where ``phi`` is the embedding before normalisation, ``phi_0`` that of the
    pre-trained tower, and ``x'`` maximises the same distance in the ball (PGD, last iterate). The square is summed over
    the embedding and averaged over the batch. Labels are not used.

    The defaults are FARE-4 of the authors' README; ``--model.attack.eps 2/255`` makes FARE-2. Departures from their
    code: the attack is driven by the summed loss, and has no momentum, which changes nothing there: the sign of a
    velocity of 0.9 and a new sign is the new sign, except where a gradient is exactly 0.

    Args:
        attack: training attack.
        optimizer: the paper's is AdamW.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: random initial weights, ``pretrained: null``.
    """

    def __init__(
        self,
        attack: Attack = PGD(eps="4/255", alpha="1/255", steps=10),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=1e-4),
        warmup_steps: CountOrZero = 1400,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        self.teacher = ImageTeacher(self.clip)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Squared distance of attacked embeddings from the pre-trained ones of the clean images."""
        original = self.teacher(batch.images)
        attacked = self.perturb(batch, forward=self.clip.embed_image, targets=original, loss=squared_distance)
        return {"squared_distance": squared_distance(self.clip.embed_image(attacked), original).mean()}


def squared_distance(embeddings: Tensor, targets: Tensor) -> Tensor:
    """``||a - b||_2^2`` per sample in fp32: embeddings ``(B, D)`` and targets ``(B, D)`` to ``(B,)``."""
    return (embeddings.float() - targets.float()).square().sum(-1)
