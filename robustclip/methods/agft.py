"""AGFT, adversarial fine-tuning towards the softened predictions of the pre-trained model."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Positive
from robustclip.methods.tecoa import TeCoA
from robustclip.models.heads import head_logits
from robustclip.models.teacher import ImageTeacher
from robustclip.types import Batch

SHARPENING = 1.8  # the authors' training scale, 180, over the own scale of their models, 100


class AGFT(TeCoA):
    """AGFT (Cui et al., CVPR 2026, https://arxiv.org/abs/2603.29410): TeCoA with soft targets instead of labels.

    The targets ``q`` are predictions of the frozen pre-trained tower ``f_0`` for the clean image ``x``, at a lower
    scale than the student's. The method minimises, and its attack maximises:

        -sum_k q_k log softmax(s cos(f(x'), t))_k,    q = softmax(gamma s cos(f_0(x), t))

    Labels are not used, so that images may be unlabelled. Where the tower can fit the targets, differences of its
    cosines become ``gamma`` times those of the pre-trained model. The scale ``s`` is that of training and its attack;
    evaluation uses the model's own.

    Departures from the authors' code: logits are products in fp32; the teacher is always in eval mode; the warm-up
    precedes the cosine instead of cutting it, which changes the rate by at most 2 per cent; ``s`` is relative to the
    model's own scale by default.

    Args:
        gamma: scale of the targets relative to ``s``; 1 gives plain soft labels.
        scale: ``s``; null for 1.8 times the model's own scale, which is 180 for OpenAI's models.
        optimizer: the authors' for ImageNet.
        kwargs: arguments of `TeCoA`; ``pseudo_labels`` must be false.

    Raises:
        ValueError: a number is not positive, there are pseudo-labels, or the model has random weights.
    """

    training_arguments: tuple[str, ...] = ("gamma", "scale")
    takes_unknown = True

    def __init__(
        self,
        gamma: Positive = 0.4,
        scale: Positive | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=4e-4, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if self.labeller is not None:
            raise ValueError("pseudo_labels must be false for AGFT, which reads no labels")
        self.gamma, self.scale = gamma, scale
        self.teacher = ImageTeacher(self.clip)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy between the teacher's softened predictions and those for the adversarial images."""
        head = self.head()
        scale = SHARPENING * self.clip.logit_scale if self.scale is None else self.scale
        targets = head_logits(self.teacher.encode_image(batch.images), head, self.gamma * scale).softmax(-1).detach()
        attacked = self.perturb(
            batch,
            forward=lambda images: head_logits(self.image_features(images), head.detach(), scale),
            targets=targets,
        )
        logits = head_logits(self.image_features(attacked), head, scale)
        return {"alignment": F.cross_entropy(logits, targets)}
