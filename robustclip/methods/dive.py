"""DiVE, fine-tuning that keeps the geometry of the pre-trained features."""

from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import NonNegative, ShareBelowOne
from robustclip.methods._shared.data_checks import anchors_of
from robustclip.methods.flyp import FLYP
from robustclip.models.teacher import Teacher
from robustclip.objectives.losses import info_nce
from robustclip.types import Batch


class DiVE(FLYP):
    """DiVE (Suzuki et al., AAAI 2026, https://arxiv.org/abs/2511.09973): FLYP that moves all reference pairs alike.

    For reference image-text pairs, ``u_j`` and ``v_j`` are the differences between the unit features of the trained and
    of the pre-trained towers, for image and text. If all differences are equal, the features are only translated. With
    FLYP's loss ``L_ctr`` on the labelled images, DiVE minimises:

        L_ctr + a mean_j (|u_j - m|^2 + |v_j - m|^2) + b mean_j |u_j - v_j|^2

    where ``m`` is a moving average of all ``u`` and ``v``, without gradient, that takes in the present batch before the
    losses use it. The pairs, ``data.anchors``, are no negatives of ``L_ctr``, so that duplicates do no harm. The run
    logs ``|m|`` as ``train/shift_norm``.

    The paper has no public code. Features of unit length, the order of the update of ``m``, and as many pairs as images
    in a batch are this project's interpretation.

    Args:
        average_weight: ``a``, of the distance to the average; the paper has one weight for both terms.
        pair_weight: ``b``, of the distance between image and text. With both weights 0 the method is FLYP.
        decay: share of ``m`` that a step keeps.
        kwargs: arguments of `FLYP`.

    Raises:
        ValueError: a weight is negative, the decay is not in [0, 1), or the model has random weights.
    """

    training_arguments: tuple[str, ...] = ("average_weight", "pair_weight", "decay")
    shift: Tensor

    def __init__(
        self,
        average_weight: NonNegative = 1000.0,
        pair_weight: NonNegative = 1000.0,
        decay: ShareBelowOne = 0.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.average_weight, self.pair_weight, self.decay = average_weight, pair_weight, decay
        self.teacher = Teacher(self.clip) if average_weight + pair_weight > 0 else None
        if self.teacher is not None:
            width = self.clip.encode_text([""]).shape[1]
            self.register_buffer("shift", torch.zeros(width), persistent=False)  # no part of the model

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns InfoNCE of the labelled images, and the terms that make the difference vectors equal.

        Raises:
            ValueError: the data have no anchors although a weight is above 0.
        """
        if self.teacher is None:
            return super().training_loss(batch)
        pairs = anchors_of(batch, "average_weight or pair_weight")
        captions = self.clip.join_tokens(self.clip.tokenize(list(pairs.captions)))
        with torch.no_grad():
            original_images = self._encode(self.teacher.encode_image, pairs.images)
            original_texts = self._encode(self.teacher.encode_tokens, captions)
        images, pair_images = self.encode_images(batch.images, pairs.images).chunk(2)
        texts, pair_texts = self.encode_tokens(self.class_prompts(batch), captions).chunk(2)
        images, texts, u, v = self.gathered(images, texts, pair_images - original_images, pair_texts - original_texts)
        terms = {"prompt_nce": info_nce(images, texts, self.clip.logit_scale)}
        self.shift.lerp_(torch.cat([u, v]).detach().mean(0), 1 - self.decay)
        self.log("train/shift_norm", self.shift.norm(), batch_size=len(u))
        if self.average_weight > 0:
            distances = (u - self.shift).square().sum(1) + (v - self.shift).square().sum(1)
            terms["average_vector"] = self.average_weight * distances.mean()
        if self.pair_weight > 0:
            terms["pair_vector"] = self.pair_weight * (u - v).square().sum(1).mean()
        return terms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the average to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["shift"] = self.shift.clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the average, which a resumed fit needs."""
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None and "shift" in checkpoint:
            self.shift.copy_(checkpoint["shift"])
