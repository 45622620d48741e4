"""Implements one PMG-AFT training step of the authors' released code in three ways; each builds on TeCoA's.

The logits are cosines, since that code normalises the scaled class features once more; both divergences are summed
over the batch; pixels are standardised by ImageNet's statistics.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import ways
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F
from ways import Problem

if TYPE_CHECKING:
    from robustclip.methods import RobustMethod


def with_imagenets_statistics(problem: Problem) -> Problem:
    """Standardises pixels by ImageNet's statistics."""
    return replace(problem, statistics=(IMAGENET_MEAN, IMAGENET_STD))


def teacher_of(problem: Problem) -> CLIP:
    """Builds a model like the student's with another image tower: with equal towers the guidance is zero."""
    teacher = problem.model()
    generator = torch.Generator().manual_seed(1)
    for parameter in teacher.visual.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return teacher


class Official(ways.Official):
    """The authors' loop, in own words: the teacher is a second full model that is not frozen."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(with_imagenets_statistics(problem))
        self.teacher = teacher_of(problem).eval()

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Runs both towers of the student."""
        return self.cosines(self.model, images, tokens)

    def cosines(self, model: CLIP, images: Tensor, tokens: Tensor) -> Tensor:
        """Runs both towers; the second normalisation takes the scale away again."""
        resized = F.interpolate(images, size=images.shape[-2:], mode="bicubic", align_corners=False)
        image_features, text_features, scale = model(self.problem.normalise(resized), tokens)
        return F.normalize(image_features, dim=-1) @ F.normalize(scale * text_features, dim=-1).T

    def loss(self, logits: Tensor, attacked: Tensor, tokens: Tensor) -> Tensor:
        """Adds both divergences; the graph reaches the teacher's weights too."""
        taught = self.cosines(self.teacher, attacked, tokens)
        clean = self.logits(self.problem.images, tokens)
        log_probabilities = F.log_softmax(logits, dim=-1)
        guidance = F.kl_div(log_probabilities, F.softmax(taught, dim=-1), reduction="sum")
        pull = F.kl_div(log_probabilities, F.softmax(clean, dim=-1), reduction="sum")
        return super().loss(logits, attacked, tokens) + guidance + pull


class Bare(ways.Bare):
    """Only the needed passes: the teacher is an image tower without gradients."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(with_imagenets_statistics(problem))
        self.scaled_classes = F.normalize(self.scaled_classes, dim=-1)
        self.teacher = teacher_of(problem).visual.requires_grad_(False).eval()

    def loss(self, attacked: Tensor) -> Tensor:
        """Adds both divergences."""
        with torch.no_grad():
            features = F.normalize(self.teacher(self.problem.normalise(attacked)), dim=-1)
            taught = F.softmax(features @ self.scaled_classes.T, dim=-1)
        logits, clean = self.logits(attacked), F.softmax(self.logits(self.problem.images), dim=-1)
        log_probabilities = F.log_softmax(logits, dim=-1)
        divergences = [F.kl_div(log_probabilities, target, reduction="sum") for target in (taught, clean)]
        return F.cross_entropy(logits, self.problem.labels) + sum(divergences)


class Ours(ways.Ours):
    """The step through the package."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.method.get_submodule("teacher.clip.net.visual").load_state_dict(teacher_of(problem).visual.state_dict())

    def build(self, **options: Any) -> "RobustMethod":
        """Constructs the method."""
        from robustclip.methods import PMGAFT

        return PMGAFT(**options, logit_scale=1.0, reduction="sum", normalisation="imagenet")
