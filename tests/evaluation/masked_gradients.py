"""Defences whose gradients are too small, too coarse, or right only under some conditions.

Each is the undefended model of the shapes world with one change, as in `masked`.
"""

import time
from typing import Any

import numpy as np
import torch
from masked import Filtered, same, seeded, through
from torch import Tensor
from torch.nn import functional as F

from robustclip.methods import RobustMethod, ZeroShot


def share_of(gradient: Tensor, share: float) -> Tensor:
    """The value ``(B, 1, 1, 1)`` below which this share of every image's absolute gradient lies."""
    return gradient.abs().flatten(1).quantile(share, 1).view(-1, 1, 1, 1)


# The forward pass is right, the backward pass is wrong


class TinyGradient(Filtered):
    """The gradient falls below the smallest numbers of fp32."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g * 1e-30 * 1e-12)


class TimeNoise(Filtered):
    """Noise on the gradient, from the clock."""

    def change(self, images: Tensor) -> Tensor:
        draws = np.random.default_rng(time.time_ns())
        return through(
            images, same, lambda g, x: g + 8 * g.std() * torch.tensor(draws.standard_normal(g.shape)).float()
        )


class ChannelsLastOnly(Filtered):
    """The gradient is right for images in another memory format than usual."""

    def change(self, images: Tensor) -> Tensor:
        is_usual = not images.is_contiguous(memory_format=torch.channels_last)
        return through(images, same, lambda g, x: seeded(g.shape, 3) * g.abs().mean() if is_usual else g)


class TurnedByHook(Filtered):
    """A hook turns the larger half of the gradient round."""

    def change(self, images: Tensor) -> Tensor:
        copy = images.clone()
        if copy.requires_grad:
            copy.register_hook(lambda g: torch.where(g.abs() > share_of(g, 0.5), -g, g))
        return copy


class WithoutPeaks(Filtered):
    """The largest half per cent of the gradient is missing, and the rest has signs by chance."""

    def change(self, images: Tensor) -> Tensor:
        def changed(g: Tensor, x: Tensor) -> Tensor:
            chance = 1e-3 * g.sign() * seeded(g.shape[1:], 2).sign()
            return torch.where(g.abs() >= share_of(g, 0.995), torch.zeros_like(g), chance)

        return through(images, same, changed)


class TurnedColumns(Filtered):
    """The gradient is turned round in every other column."""

    def change(self, images: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(images.shape[-1]) % 2)
        return through(images, same, lambda g, x: g * signs)


class RightTwice(Filtered):
    """The gradient is right for the first two images with the same coarse colours, and turned round for later ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: dict[float, int] = {}

    def change(self, images: Tensor) -> Tensor:
        def changed(g: Tensor, x: Tensor) -> Tensor:
            keys = (4 * x).round().flatten(1).sum(1).tolist()
            for key in keys:
                self._counts[key] = self._counts.get(key, 0) + 1
            return g * torch.tensor([1.0 if self._counts[key] <= 2 else -1.0 for key in keys]).view(-1, 1, 1, 1)

        return through(images, same, changed)


# The forward pass changes


class BatchMean(ZeroShot):
    """Features without half of the mean of their batch."""

    def image_features(self, images: Tensor) -> Tensor:
        features = super().image_features(images)
        return F.normalize(features - features.mean(0, keepdim=True) / 2, dim=-1)


class CoarseColours(Filtered):
    """The luminance is kept, and the colours are rounded."""

    def change(self, images: Tensor) -> Tensor:
        grey = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return (grey + ((images - grey) * 6).round() / 6).clamp(0, 1)


class RoundedLogits(ZeroShot):
    """Logits rounded to halves, with the gradient of a noisy image's logits."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        noisy = super().logits((images + 0.2 * seeded(images.shape[1:], 1)).clamp(0, 1), task)
        return (2 * super().logits(images, task)).round() / 2 + noisy - noisy.detach()


class SignsOfPlanes(ZeroShot):
    """Features by the sides of random planes on which they lie, with the gradient of other features."""

    def image_features(self, images: Tensor) -> Tensor:
        features = super().image_features(images)
        planes = torch.linalg.qr(seeded(torch.Size([features.shape[1]] * 2), 5)).Q
        other = 1e-3 * features.roll(7, 1)
        return F.normalize((features @ planes).sign() @ planes.T, dim=-1) + other - other.detach()


class SureOrNot(ZeroShot):
    """Logits of sure answers are ten thousand times as large, those of others as small."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        first, second = logits.topk(2).values.unbind(-1)
        return logits * torch.where(first - second > 1, 1e4, 1e-4)[:, None].detach()


class TopOfLogits(ZeroShot):
    """The largest logit is raised by 20, where cross-entropy rounds to 0 and loses the label's gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        return logits + 20 * F.one_hot(logits.argmax(-1), logits.shape[1])


GRADIENTS: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (
        TinyGradient, TimeNoise, ChannelsLastOnly, TurnedByHook, WithoutPeaks, TurnedColumns, RightTwice, BatchMean,
        CoarseColours, RoundedLogits, SignsOfPlanes, SureOrNot, TopOfLogits,
    )
}  # fmt: skip
