"""CLIPure-Cos: moves the image feature towards the feature of a text without a class name."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, Positive
from robustclip.defences.defence import Defence, Model


class CLIPure(Defence):
    """CLIPure-Cos (Zhang et al., ICLR 2025, arXiv:2502.18176).

    The unit feature ``u`` of the image is changed ``steps`` times, where ``b`` is the unit feature of a blank text:

        u <- normalise(u + length t),  t = unit vector of the gradient of cos(u, b)

    ``t`` is tangent to ``u``, so that a step turns ``u`` by ``atan(length)``, 88 degrees by default, past ``b``; the
    next step turns it back. ``t`` has no gradient, as in the authors' code; `surrogate` keeps it. Departure: ``t`` is
    normalised per sample, where the code normalises it over the batch.

    Args:
        steps: number of steps.
        length: length of a step.
        templates: texts with ``{c}`` in the place of the class name, which is left empty; ``b`` is their mean.
    """

    backward = "none"

    def __init__(
        self, steps: Count = 10, length: Positive = 30.0, templates: tuple[str, ...] = ("a photo of a {c}.",)
    ) -> None:
        super().__init__()
        self.steps, self.length, self.templates = steps, length, templates
        self._blank: tuple[Tensor, Tensor] | None = None  # head of the task and feature, which change together

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the logits of the turned features; their direction is a constant of the gradient."""
        return self.classify(method, self.turned(method.image_features(images), self.blank(method, task)), task)

    def surrogate(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the same logits with the whole gradient."""
        features = self.turned(method.image_features(images), self.blank(method, task), is_whole=True)
        return self.classify(method, features, task)

    def turned(self, features: Tensor, blank: Tensor, *, is_whole: bool = False) -> Tensor:
        """Takes all steps.

        Args:
            features: unit features ``(B, D)`` of the images.
            blank: unit feature ``(D,)`` of the blank text.
            is_whole: whether the direction of a step has a gradient.
        """
        for _ in range(self.steps):
            # The gradient of cos(u, b) at a unit vector u is b - cos(u, b) u.
            tangent = blank - (features @ blank)[:, None] * features
            direction = F.normalize(tangent if is_whole else tangent.detach(), dim=-1)
            features = F.normalize(features + self.length * direction, dim=-1)
        return features

    def blank(self, method: Model, task: str) -> Tensor:
        """Encodes the templates without a class name, once per evaluation.

        Args:
            method: method with the text tower.
            task: name of the task, whose classifier is encoded again whenever the text tower may have changed.
        """
        head = method.heads[task]
        if self._blank is None or self._blank[0] is not head:
            with torch.inference_mode(False), torch.no_grad():
                texts = [template.format(c="") for template in self.templates]
                self._blank = head, F.normalize(method.clip.encode_text(texts).mean(0), dim=-1)
        return self._blank[1]
