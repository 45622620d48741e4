"""Defences of other kinds that hide their gradients: saturation, features, gates, votes, tables, memory.

Each is the undefended model of the shapes world with one change, as in `masked`.
"""

from typing import Any

import torch
from masked import Filtered, checksums, same, seeded, through
from masked_further import Inside, per_image
from torch import Tensor
from torch.nn import functional as F

from robustclip.methods import RobustMethod, ZeroShot

# Saturation


class SlowSign(ZeroShot):
    """Features through a steep hyperbolic tangent: smooth, nearly a sign, with gradients that all but vanish."""

    gain = 5000.0

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(torch.tanh(self.gain * super().image_features(images)), dim=-1)


class SlowSign300(SlowSign):
    gain = 300.0


class SlowSign500(SlowSign):
    gain = 500.0


class SlowSign1000(SlowSign):
    gain = 1000.0


class SlowSignMid(Inside):
    """A stage of the tower saturates."""

    def change(self, maps: Tensor) -> Tensor:
        size = maps.abs().mean()
        return size.detach() * torch.tanh(30 * (maps - maps.mean((2, 3), keepdim=True).detach()) / size.detach()) + maps


class FeatureStairs(ZeroShot):
    """Features through a smooth staircase."""

    def image_features(self, images: Tensor) -> Tensor:
        f = super().image_features(images)
        levels = 0.08 * torch.arange(-6, 7)
        return F.normalize(torch.sigmoid(2000 * (f[..., None] - levels)).sum(-1) * 0.08 - 0.52 + 1e-4 * f, dim=-1)


class FeatureWave(ZeroShot):
    """Features with a staircase of sines, flat at its levels."""

    def image_features(self, images: Tensor) -> Tensor:
        f = super().image_features(images)
        return F.normalize(f - torch.sin(2 * torch.pi * 12 * f) / (2 * torch.pi * 12), dim=-1)


class LogitSquash(ZeroShot):
    """Logits that saturate; their differences have no gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        return 5 * torch.tanh(z - z.mean(-1, keepdim=True)) + 0.01 * z.detach()


class MarginCap(ZeroShot):
    """The largest logit is at most a little above the second."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        second = z.topk(2, -1).values[:, 1:]
        return torch.where(z > second, second + 0.5 * torch.tanh(8 * (z - second)), z)


# Features and heads


class FeatureBits(ZeroShot):
    """Features of eight levels, with a gradient of noise that the features seed."""

    def image_features(self, images: Tensor) -> Tensor:
        f = super().image_features(images)
        return F.normalize(through(f, lambda v: (v * 16).round() / 16 + 1e-3 * v, lambda g, v: g.roll(5, -1)), dim=-1)


class IntegerFeatures(ZeroShot):
    """Integer features of seven bits, straight through for the positive ones alone."""

    def image_features(self, images: Tensor) -> Tensor:
        f = super().image_features(images)
        return F.normalize(through(f, lambda v: (v * 127).round() / 127, lambda g, v: g * (v > 0.1)), dim=-1)


class NearestPrototype(ZeroShot):
    """Similarities that underflow: exp of minus a thousand times the squared distance to the class."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        return 20 * torch.exp(-5 * (z.amax(-1, keepdim=True).detach() + 1 - z))


class ConfidenceGate(ZeroShot):
    """A sure answer is one-hot without gradient; others are logits."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        is_sure = z.softmax(-1).amax(-1, keepdim=True) > 0.25
        return torch.where(is_sure, 8.0 * F.one_hot(z.argmax(-1), z.shape[1]) + 0 * z, z)


class DetachedTop(ZeroShot):
    """The two largest logits carry no gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        second = z.topk(2, -1).values[:, 1:]
        return torch.where(z >= second, z.detach(), z)


class DetachedGain(ZeroShot):
    """Features times a gain that falls with their own certainty, and carries no gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        top = z.topk(2, -1).values
        return z * torch.exp(-2 * (top[:, :1] - top[:, 1:])).detach() + 0.2 * z.detach()


class VotesOfCrops(ZeroShot):
    """Hard votes of nine crops, with the gradient of the mirrored image's logits."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        padded, side = F.pad(images, (2, 2, 2, 2), "replicate"), images.shape[-1]
        crops = [padded[..., i : i + side, j : j + side] for i in (0, 2, 4) for j in (0, 2, 4)]
        z = torch.stack([super(VotesOfCrops, self).logits(crop, task).detach() for crop in crops])
        votes = F.one_hot(z.argmax(-1), z.shape[-1]).float().sum(0) + 0.01 * z.mean(0)
        mirrored = super().logits(images.flip(-1), task)
        return votes + mirrored - mirrored.detach()


class SoftVotesOfCrops(ZeroShot):
    """Votes of nine crops through a sharp softmax."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        padded, side = F.pad(images, (2, 2, 2, 2), "replicate"), images.shape[-1]
        crops = [padded[..., i : i + side, j : j + side] for i in (0, 2, 4) for j in (0, 2, 4)]
        z = torch.stack([super(SoftVotesOfCrops, self).logits(crop, task) for crop in crops])
        return (50 * z).softmax(-1).sum(0)


class LogTable(ZeroShot):
    """Logarithms of probabilities, cut at one in a hundred."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return super().logits(images, task).softmax(-1).clamp(min=1e-2, max=0.6).log()


# Pixels


class PixelTable(Filtered):
    """A table of 256 entries that is not quite monotonic, straight through."""

    def change(self, images: Tensor) -> Tensor:
        table = (torch.arange(256) + 3 * seeded(torch.Size((256,)), 5)).clamp(0, 255) / 255
        return through(images, lambda x: table[(x * 255).round().long().clamp(0, 255)], lambda g, x: g)


class CodeBook(Filtered):
    """Every patch of 2 x 2 pixels moves half way to the nearest of its own rounded colours, by a sharp softmax."""

    def change(self, images: Tensor) -> Tensor:
        levels = torch.linspace(0, 1, 9)
        weights = (-3000 * (images[..., None] - levels).square()).softmax(-1)
        return (weights * levels).sum(-1)


class KeyedPatches(Filtered):
    """A quarter of the patches are grey, by a key of the coarse image."""

    def change(self, images: Tensor) -> Tensor:
        keys = checksums(F.avg_pool2d(images.detach(), 8))
        masks = torch.stack([(torch.rand(8, 8, generator=torch.Generator().manual_seed(k)) > 0.25) for k in keys])
        mask = F.interpolate(masks.float()[:, None], images.shape[-2:])
        return images * mask + 0.5 * (1 - mask)


class WrongBranch(ZeroShot):
    """The answer is of the image; the gradient is of a transposed copy, whose size it has."""

    def image_features(self, images: Tensor) -> Tensor:
        other = super().image_features(images.mT)
        return super().image_features(images).detach() + other - other.detach()


class DitherSelf(Filtered):
    """Rounds to twelve levels after noise that the pixel's neighbours choose, straight through."""

    def change(self, images: Tensor) -> Tensor:
        x = images.detach()
        noise = torch.frac(997 * (x.roll(1, -1) + 3 * x.roll(1, -2))) - 0.5
        return images + (((12 * x + noise).round() / 12) - x)


class ZeroBackward(Filtered):
    """The gradient is next to nothing but for noise in few places."""

    def change(self, images: Tensor) -> Tensor:
        def nothing(g: Tensor, x: Tensor) -> Tensor:
            return 1e-12 * g.std() * seeded(x.shape, 4)

        return through(images, same, nothing)


class MixedSigns(Filtered):
    """The gradient has its size, and the sign of a coarse board of 4 x 4 fields."""

    def change(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        rows = torch.arange(side) // 4
        board = ((rows[:, None] + rows) % 2).float() * 2 - 1
        return through(images, same, lambda g, x: g * board)


class AwayFromClean(Filtered):
    """Beyond a quarter grey level from the 8-bit grid, the gradient of a blurred image counts too, with other sign."""

    def change(self, images: Tensor) -> Tensor:
        far = ((images * 255) - (images * 255).round()).abs().flatten(1).mean(1) > 0.2
        return through(images, same, lambda g, x: torch.where(per_image(far), F.avg_pool2d(g, 9, 1, 4) * -3 + g, g))


# Memory


class FirstSeen(ZeroShot):
    """The answer to an image is that of the first one with the same coarse colours, once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[Any, Tensor] = {}

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        z = super().logits(images, task)
        coarse = (F.avg_pool2d(images.detach(), 8).flatten(1) * 12).round().to(torch.int8)
        keys = [(z.shape[1], row.numpy().tobytes()) for row in coarse]
        for key, value in zip(keys, z.detach(), strict=True):
            self.table.setdefault(key, value.clone())
        return 0.9 * torch.stack([self.table[key] for key in keys]) + 0.1 * z


SEEN: dict[Any, Tensor] = {}


class FirstSeenOutside(FirstSeen):
    """The same table outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _Hidden(SEEN)  # type: ignore[assignment]


class _Hidden:
    """A mapping that no search of a model's tensors finds."""

    def __init__(self, table: dict[Any, Tensor]) -> None:
        self.setdefault, self.__class__.__getitem__ = table.setdefault, lambda _, key: table[key]


OTHERS: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (
        SlowSign, SlowSign300, SlowSign500, SlowSign1000, SlowSignMid, FeatureStairs, FeatureWave, LogitSquash,
        MarginCap, FeatureBits, IntegerFeatures, NearestPrototype, ConfidenceGate, DetachedTop,
        DetachedGain, VotesOfCrops, SoftVotesOfCrops, LogTable, PixelTable, CodeBook, KeyedPatches,
        WrongBranch, DitherSelf, ZeroBackward, MixedSigns, AwayFromClean, FirstSeen, FirstSeenOutside,
    )
}  # fmt: skip
