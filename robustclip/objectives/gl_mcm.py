"""GL-MCM, a score from an image as a whole and from its positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from robustclip.arguments import NonNegative, Positive, checked
from robustclip.objectives.scores import Model, Score, confidence
from robustclip.types import Data, Task


@checked
class GLMCM(Score):
    """GL-MCM (Miyai et al., IJCV 2025, https://arxiv.org/abs/2304.04521): MCM of the image and of its clearest part.

    The highest softmax probability of the cosines of the whole image is added to ``w`` times the highest one over the
    classes and positions, where every position has a softmax of its own. See `CLIPModel.embed_grid` for the features
    of positions. Attacks move the score itself, which does not saturate at temperature 1. The classifier weights are
    those of the task, also for positions; the authors take "a photo of a {}".

    Args:
        weight: ``w``; 0 gives MCM. The authors' script for ImageNet has 0.5, their code 1.
        temperature: temperature of both softmaxes of the cosines.
    """

    name = "gl_mcm"
    reads_positions = True

    def __init__(self, weight: NonNegative = 0.5, temperature: Positive = 1.0) -> None:
        self.weight, self.temperature = weight, temperature

    def setup(self, data: Data, tasks: Sequence[Task]) -> None:
        """Refuses embeddings in place of images."""
        if data.feature_model is not None:
            raise ValueError(
                "gl_mcm needs images, and data.features gives embeddings; set data.features_in_test to false"
            )

    def prepare(self, model: Model, task: Task) -> None:
        """Refuses a model without features of positions, by an empty image."""
        size = model.clip.image_size
        model.grid_features(torch.zeros(1, 3, size, size, device=model.clip.mean.device))

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        """Computes the logits ``(B, 1 + P, C)`` of the image and of its positions."""
        return model.grid_logits(images, task)

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the sum of both terms.

        Args:
            outputs: logits ``(B, 1 + P, C)``.
            scale: inverse temperature of the model's logits, a scalar.
        """
        confidences = confidence(outputs / scale / self.temperature)
        return confidences[:, 0] + self.weight * confidences[:, 1:].amax(1)
