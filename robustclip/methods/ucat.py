"""UCAT, adversarial fine-tuning that keeps the evidence of the pre-trained model."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import NonNegative, Positive
from robustclip.methods.tecoa import TeCoA
from robustclip.models.heads import head_logits
from robustclip.models.teacher import ImageTeacher
from robustclip.objectives.losses import dirichlet_kl, evidence, kl, widest
from robustclip.types import Batch

SMALLEST = 0.003  # temperature below which exp(2 / temperature) overflows fp64


class UCAT(TeCoA):
    """UCAT (Lu et al., ICML 2026, https://arxiv.org/abs/2512.12997): TeCoA and a pull towards the original evidence.

    Cosines ``c`` of the adversarial image and ``o`` of the frozen original model on the clean image are read as
    Dirichlet concentrations ``a = exp((c + 1) / tau)`` and ``b = exp((o + 1) / tau)``. The method minimises:

        CE(s c, y) + w / (1 + exp(2 / tau)) KL(Dir(a) || Dir(b))

    averaged over the batch. The attack is TeCoA's, on the cross-entropy alone. At the paper's ``tau`` the second term
    equals the weighted categorical divergence that the form ``evidence`` computes, to eight digits and without
    overflow: ``level KL(softmax(o / tau) || softmax(c / tau))`` with
    ``level = w sum_k exp((o_k - 1) / tau) / (1 + exp(-2 / tau))``, logged as ``train/level``. It depends on model and
    class list, 240 for CLIP with 200 classes; for other models choose ``w`` so that the level is about that.

    Departures from the authors' code: the term is in fp64 from cosines in fp32 (the code: fp16), and the student's
    clean pass, whose result their loss does not use, is left out.

    Args:
        temperature: ``tau``.
        weight: ``w``; at 0 the method is TeCoA.
        form: ``evidence``, ``dirichlet`` for the exact divergence, or ``forward`` for ``KL(Dir(b) || Dir(a))``.
        level: constant in place of the level, for the form ``evidence``, an ablation; null for the formula.
        reference: model of ``o``: the frozen ``original``, or the ``student`` on the clean image, without gradient.
        optimizer: the authors' for Tiny-ImageNet.
        kwargs: arguments of `TeCoA`.

    Raises:
        ValueError: a number is out of range, a level is given for another form, or the model has random weights.
    """

    training_arguments: tuple[str, ...] = ("temperature", "weight", "form", "level", "reference")

    def __init__(
        self,
        temperature: Positive = 0.07,
        weight: NonNegative = 1e5,
        form: Literal["evidence", "dirichlet", "forward"] = "evidence",
        level: NonNegative | None = None,
        reference: Literal["original", "student"] = "original",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if form != "evidence" and level is not None:
            raise ValueError(f"level must be null for the form {form}, got {level:g}; take the form evidence")
        if form != "evidence" and temperature < SMALLEST:
            raise ValueError(f"temperature must be at least {SMALLEST} for the form {form}, got {temperature:g}")
        self.temperature, self.weight, self.form, self.level = temperature, weight, form, level
        self.teacher = ImageTeacher(self.clip) if reference == "original" and weight > 0 else None

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns TeCoA's term and, unless its weight is 0, the divergence from the original evidence."""
        head = self.head()
        features = self.image_features(self.perturb(batch))
        terms = {"adversarial_ce": F.cross_entropy(head_logits(features, head, self.clip.logit_scale), batch.labels)}
        if self.weight > 0:
            with torch.no_grad():
                encode = self.image_features if self.teacher is None else self.teacher.encode_image
                original = widest(head_logits(encode(batch.images), head))
            terms["evidence"] = self._divergence(widest(head_logits(features, head)), original).mean()
        return terms

    def _divergence(self, cosines: Tensor, original: Tensor) -> Tensor:
        """Computes the weighted divergence ``(B,)`` of cosines ``(B, C)`` from the original ones."""
        tau = self.temperature
        if self.form == "evidence":
            level = self.weight * evidence(original, tau) if self.level is None else original.new_tensor(self.level)
            self.log("train/level", level.mean(), batch_size=len(cosines))
            return level * kl(cosines / tau, original / tau)
        pair = (cosines, original) if self.form == "dirichlet" else (original, cosines)
        return self.weight / (1 + cosines.new_tensor(2 / tau).exp()) * dirichlet_kl(*pair, tau)
