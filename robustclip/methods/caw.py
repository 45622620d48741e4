"""CAW, adversarial fine-tuning that weighs images by the confidence in their labels."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import NonNegative
from robustclip.methods.tecoa import TeCoA
from robustclip.models.heads import head_logits
from robustclip.models.teacher import ImageTeacher
from robustclip.objectives.losses import kl, reverse_kl
from robustclip.types import Batch


class CAW(TeCoA):
    """CAW (Naghavian and Tavassolipour, 2025, https://arxiv.org/abs/2510.02913): TeCoA, guided by the original model.

    With ``P'`` the student's softmax for the adversarial image ``x'``, ``P_0`` that of the frozen original model for
    the clean image ``x``, and ``f``, ``f_0`` the unit features of both, the method minimises:

        CE(P', y) + alpha KL(P' || P_0) (1 - P'_y) + beta || f(x') - f_0(x') ||

    averaged over the batch. The attack is TeCoA's, on the cross-entropy alone. An image whose label the model gives a
    low probability under attack weighs most, also one with a wrong label.

    There is no public code, and the paper's text was not at hand: abstract and summaries give the three terms. The
    weights ``alpha`` and ``beta`` and the use of unit features are this project's choice, and the optimiser is that of
    TGA-ZSR, whose tables the paper continues.

    Args:
        alpha: weight of the divergence.
        beta: weight of the distance of the features.
        reference: model of ``P_0``: the frozen ``original``, or the ``student`` on the clean image, without gradient.
        kl_direction: ``reverse`` is ``KL(P' || P_0)``, and ``forward`` the other order, an ablation.
        detach_weight: pass no gradient through ``1 - P'_y``.
        optimizer: TGA-ZSR's.
        kwargs: arguments of `TeCoA`.

    Raises:
        ValueError: a weight is negative, or the model has random weights.
    """

    training_arguments: tuple[str, ...] = ("alpha", "beta", "reference", "kl_direction", "detach_weight")

    def __init__(
        self,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 1.0,
        reference: Literal["original", "student"] = "original",
        kl_direction: Literal["reverse", "forward"] = "reverse",
        detach_weight: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.alpha, self.beta, self.reference, self.detach_weight = alpha, beta, reference, detach_weight
        self.kl = {"reverse": reverse_kl, "forward": kl}[kl_direction]
        needs_teacher = beta > 0 or (alpha > 0 and reference == "original")
        self.teacher = ImageTeacher(self.clip) if needs_teacher else None

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns TeCoA's term, and each of the others unless its weight is 0."""
        attacked, head, scale = self.perturb(batch), self.head(), self.clip.logit_scale
        logits = head_logits(features := self.image_features(attacked), head, scale)
        terms = {"adversarial_ce": F.cross_entropy(logits, batch.labels)}
        original = self.image_features if self.teacher is None else self.teacher.encode_image
        if self.alpha > 0:
            with torch.no_grad():
                encode = original if self.reference == "original" else self.image_features
                clean = head_logits(encode(batch.images), head, scale)
            weight = 1 - logits.softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
            weight = weight.detach() if self.detach_weight else weight
            terms["confidence"] = self.alpha * (self.kl(logits, clean) * weight).mean()
        if self.beta > 0:  # the gradient of the norm is 0 where both features agree
            distance = torch.linalg.vector_norm(features - original(attacked), dim=-1)
            terms["feature_pull"] = self.beta * distance.mean()
        return terms
