"""Smoothing by Gaussian noise: the mean prediction over noisy copies of an image."""

import math

import torch
from torch import Tensor

from robustclip.arguments import Count, NonNegative
from robustclip.defences.defence import Defence, Model


class GaussianNoise(Defence):
    """Averages predictions over noisy copies, as randomised smoothing does (Cohen et al., arXiv:1902.02918).

    The logits are ``log mean_k softmax z(x + sigma n_k)``, where ``n_k`` is standard normal. There is no
    certificate.

    Args:
        sigma: standard deviation of the noise, in [0, 1] pixel units.
        copies: number of noisy copies; with one, its logits are returned.
    """

    is_random = True

    def __init__(self, sigma: NonNegative = 0.1, copies: Count = 8) -> None:
        super().__init__()
        self.sigma, self.copies = sigma, copies

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the logarithm of the mean probabilities."""
        shape = tuple(images.shape[1:])
        logits = [
            method.logits(images + self.sigma * self.normal(index, shape, draw=draw, part=copy), task)
            for copy in range(self.copies)
        ]
        if self.copies == 1:
            return logits[0]
        return torch.stack(logits).log_softmax(-1).logsumexp(0) - math.log(self.copies)
