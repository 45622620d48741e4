"""Defences that hide their gradients by gates on margin, batch, loss or query, by ripples, ranks and class texts.

Each is the undefended model of the shapes world with one change, as in `masked`.
"""

import torch
from masked import Filtered, checksums, same, seeded, through
from masked_further import mixed, per_image
from torch import Tensor
from torch.nn import functional as F

from robustclip.methods import RobustMethod, ZeroShot


def gaps(logits: Tensor) -> Tensor:
    """Differences of the two largest logits."""
    top = logits.topk(2, -1).values
    return top[:, 0] - top[:, 1]


class OfLogits(ZeroShot):
    """Changes the logits of the undefended model."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return self.changed(super().logits(images, task), images)

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        raise NotImplementedError


# Logits whose order is right, and whose gradient is of no use


class RankLogits(OfLogits):
    """Soft ranks, so that all gaps are alike."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        return torch.sigmoid(60 * (z[:, :, None] - z[:, None, :])).sum(-1)


class LogitFloor(OfLogits):
    """All classes but those close to the best one have one value."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        return (z - z.amax(-1, keepdim=True)).clamp(min=-0.5)


class NinthPower(OfLogits):
    """Flat near the boundary, steep far from it."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred.sign() * centred.abs() ** 9 / 1e3


class OthersLow(OfLogits):
    """All classes but the best one are far below it."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        return torch.where(z == z.amax(-1, keepdim=True), z, -1e4 + 0.01 * z)


class AbstainInf(OfLogits):
    """An unsure answer is infinite."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        is_top = z == z.amax(-1, keepdim=True)
        return torch.where((gaps(z.detach()) < 2)[:, None] & is_top, torch.inf, z)


class DarkTemperature(OfLogits):
    """The image's brightness sets the temperature, with a right gradient that lowers the loss without any success."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) * torch.exp(-300 * (images.mean((1, 2, 3)) - 0.5))[:, None]


class VariationTemperature(OfLogits):
    """The image's total variation sets the temperature."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        variation = images.diff(dim=-1).abs().mean((1, 2, 3)) + images.diff(dim=-2).abs().mean((1, 2, 3))
        return z * torch.exp(-30 * variation)[:, None]


class Ripple(OfLogits):
    """Every logit has a small wave along its own direction of pixels, with a right and steep gradient."""

    height, frequency = 0.25, 600.0

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        signs = torch.stack([seeded(images.shape[1:], n).sign() for n in range(z.shape[1])]).flatten(1)
        return z + self.height * torch.sin(self.frequency * images.flatten(1) @ signs.T / signs.shape[1] ** 0.5)


# Backward passes that know the class, the loss, or the other samples


class ClassFlip(OfLogits):
    """The gradient of every other class is turned round."""

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(z.shape[1]) % 2).float()
        return through(z, same, lambda g, _: g * signs)


class HonestToMargins(OfLogits):
    """The gradient is right for the margin, which has two classes, and turned round for cross-entropy."""

    sign = -1

    def changed(self, z: Tensor, images: Tensor) -> Tensor:
        return through(z, same, lambda g, _: torch.where(((g != 0).sum(1) == 2)[:, None], g, -g) * -self.sign)


class HonestToCrossEntropy(HonestToMargins):
    """The gradient is right for cross-entropy alone."""

    sign = 1


class BatchRoll(Filtered):
    """The gradient belongs to the next sample."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g.roll(1, 0))


class SteConstantNoise(Filtered):
    """The gradient has the same noise for every image."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g + 3 * g.flatten(1).std(1).view(-1, 1, 1, 1) * seeded(x.shape, 11))


# Gates


class UnsureNoise(ZeroShot):
    """Images near the boundary get noise."""

    def noise(self, images: Tensor) -> Tensor:
        return torch.randn_like(images)

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        with torch.no_grad():
            is_unsure = gaps(super().logits(images, task)) < 3
        return super().logits(images + 0.15 * per_image(is_unsure) * self.noise(images), task)


class UnsureHashedNoise(UnsureNoise):
    """Images near the boundary get noise that their own pixels seed."""

    def noise(self, images: Tensor) -> Tensor:
        return mixed(images)


class GradModeBlur(Filtered):
    """Images are blurred wherever gradients are enabled."""

    def change(self, images: Tensor) -> Tensor:
        blurred = F.avg_pool2d(F.pad(images, (3, 3, 3, 3), "replicate"), 7, 1)
        return blurred if torch.is_grad_enabled() else images


class FarBlur(Filtered):
    """The blur grows smoothly with the distance from the 8-bit grid."""

    def change(self, images: Tensor) -> Tensor:
        weight = (4 * (torch.sin(torch.pi * 255 * images) ** 2).mean((1, 2, 3), keepdim=True)).clamp(max=1)
        return images * (1 - weight) + F.avg_pool2d(F.pad(images, (2, 2, 2, 2), "replicate"), 5, 1) * weight


class MaskedMember(ZeroShot):
    """An ensemble whose heavier member, of the mirrored image, is cut off."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return 0.25 * super().logits(images, task) + 0.75 * super().logits(images.flip(-1).detach(), task)


class HashedClassTexts(ZeroShot):
    """The class texts get noise that the image's pixels seed."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        features, head = self.image_features(images), self.heads[task]
        noisy = [F.normalize(head + 0.04 * seeded(head.shape, number), dim=-1) for number in checksums(images)]
        return 26 * torch.stack([row @ weights.T for row, weights in zip(features, noisy, strict=True)])


GATED: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (
        RankLogits, LogitFloor, NinthPower, OthersLow, AbstainInf, DarkTemperature, VariationTemperature, Ripple,
        ClassFlip, HonestToMargins, HonestToCrossEntropy, BatchRoll, SteConstantNoise, UnsureNoise,
        UnsureHashedNoise, GradModeBlur, FarBlur, MaskedMember, HashedClassTexts,
    )
}  # fmt: skip
