"""Small defences with known truth, test data of the audit: most only hide their gradients, some are honest.

Each is the undefended model of the shapes world with one change. `MASKED` must get a grade below B, or a number near
the truth; `HONEST` must get no warning.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.methods import RobustMethod, ZeroShot

Change = Callable[[Tensor, Tensor], Tensor]
"""Maps the incoming gradient and the images to the outgoing gradient."""


class _Through(torch.autograd.Function):
    """A function of the images with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, function: Callable[[Tensor], Tensor], change: Change) -> Tensor:
        ctx.save_for_backward(images)
        ctx.change = change
        return function(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.change(gradient, *ctx.saved_tensors), None, None


def through(images: Tensor, function: Callable[[Tensor], Tensor], change: Change) -> Tensor:
    """Applies a function whose gradient is another one."""
    result: Tensor = _Through.apply(images, function, change)
    return result


def same(images: Tensor) -> Tensor:
    """A copy."""
    return images.clone()


def seeded(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checksums(images: Tensor) -> list[int]:
    """A number from the 8-bit pixels of each image."""
    return [zlib.crc32((image * 255).round().byte().numpy().tobytes()) for image in images.detach()]


class Filtered(ZeroShot):
    """The model on changed images."""

    def change(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(self.change(images))


# The forward pass is right, the backward pass is wrong


class SteFlip(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: -g)


class SteRandom(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: 1e-3 * seeded(x.shape, 0))


class SteNoisy(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g + 8 * g.flatten(1).std(1).view(-1, 1, 1, 1) * torch.randn_like(g))


class StePermuted(Filtered):
    """The gradient belongs to other pixels."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g.flip(-1).roll(7, -2))


class SteOnePixel(Filtered):
    """The gradient is right in its largest entry alone."""

    def change(self, images: Tensor) -> Tensor:
        def only_largest(g: Tensor, x: Tensor) -> Tensor:
            flat = g.flatten(1)
            place = flat.abs().argmax(1, keepdim=True)
            return torch.zeros_like(flat).scatter(1, place, flat.gather(1, place)).view_as(g)

        return through(images, same, only_largest)


class SteOffGrid(Filtered):
    """The gradient is right for 8-bit images, and turned round for all others."""

    def change(self, images: Tensor) -> Tensor:
        def turned(g: Tensor, x: Tensor) -> Tensor:
            is_off = ((x * 255) - (x * 255).round()).abs().flatten(1).amax(1) > 1e-3
            return torch.where(is_off.view(-1, 1, 1, 1), -g, g)

        return through(images, same, turned)


class SteHalf(Filtered):
    """The gradient is right in the upper half, and turned round in the lower one."""

    def change(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        signs = torch.ones(side, 1)
        signs[side // 2 :] = -1
        return through(images, same, lambda g, x: g * signs)


class SteSmooth(Filtered):
    """The gradient is blurred to one colour per channel."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g.mean((2, 3), keepdim=True).expand_as(g))


class DetachStage(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(images.detach()) + 0 * images.mean()


class DetachMid(ZeroShot):
    """A late stage is cut off; the mean colour gives the gradient."""

    def image_features(self, images: Tensor) -> Tensor:
        features = super().image_features(images.detach())
        return F.normalize(features + 1e-3 * (images - images.detach()).mean((1, 2, 3))[:, None], dim=-1)


class DetachMost(ZeroShot):
    """A blurred copy gives the gradient, the sharp image the answer."""

    def image_features(self, images: Tensor) -> Tensor:
        blurred = super().image_features(F.avg_pool2d(images, 9, 1, 4))
        return super().image_features(images).detach() + blurred - blurred.detach()


# Shattered or quantised images

LEVELS = (torch.arange(16) + 0.5) / 16


class Thermometer(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return (images[..., None] > LEVELS).float().mean(-1) + 0 * images


class SoftThermometer(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return torch.sigmoid(2000 * (images[..., None] - LEVELS)).mean(-1)


class Bits3(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return (7 * images).round() / 7


class Bits3Ste(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images + ((7 * images).round() / 7 - images).detach()


class Bits8(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return (255 * images).round() / 255


class Wobble(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images + 0.004 * torch.sin(2 * torch.pi * 3 * 255 * images)


class Jpeg(Filtered):
    def change(self, images: Tensor) -> Tensor:
        decoded = []
        for image in (images.detach() * 255).round().byte().permute(0, 2, 3, 1).numpy():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "jpeg", quality=60)
            decoded.append(np.asarray(Image.open(buffer), dtype=np.float32) / 255)
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) + 0 * images


class ContrastClip(Filtered):
    """A contrast so high that nearly all pixels saturate."""

    def change(self, images: Tensor) -> Tensor:
        return torch.sigmoid(60 * (images - 0.5))


class RejectOffGrid(ZeroShot):
    """Images off the 8-bit grid get logits without a gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        is_off = ((images * 255) - (images * 255).round()).abs().flatten(1).amax(1) > 1e-3
        return torch.where(is_off[:, None], logits.detach(), logits)


# Random, or seeded by the image's own pixels


class Noise(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images + 0.1 * torch.randn_like(images)


class RandomDropout(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(F.dropout(super().image_features(images), 0.2), dim=-1)


class RandomResizePad(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return torch.cat([resized_and_padded(image[None], torch.default_generator) for image in images])


class HashedNoise(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images + 0.1 * torch.stack([seeded(images.shape[1:], number) for number in checksums(images)])


class HashedResizePad(Filtered):
    def change(self, images: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in checksums(images)]
        return torch.cat([resized_and_padded(image[None], g) for image, g in zip(images, generators, strict=True)])


def resized_and_padded(image: Tensor, generator: torch.Generator) -> Tensor:
    full = image.shape[-1]
    side = int(torch.randint(full - 6, full + 1, (1,), generator=generator))
    left, top = (int(torch.randint(0, full - side + 1, (1,), generator=generator)) for _ in range(2))
    small = F.interpolate(image, (side, side), mode="bilinear", align_corners=False)
    return F.pad(small, (left, full - side - left, top, full - side - top), value=0.5)


# Inside the network


class KeepLargest(nn.Module):
    """A ReLU that keeps the largest share of every map."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), 1).values[:, -1:]
        return x * (flat >= least).view_as(x)


class KWTA30(ZeroShot):
    def __init__(self, share: float = 0.3) -> None:
        super().__init__()
        for owner in list(self.clip.net.visual.modules()):
            for name, part in list(owner.named_children()):
                if isinstance(part, nn.ReLU):
                    setattr(owner, name, KeepLargest(share))


class HardSign(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        features = super().image_features(images)
        return F.normalize(features.sign() + 1e-4 * features, dim=-1)


# Logits


class Scaled(ZeroShot):
    factor = 1.0

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return self.factor * super().logits(images, task)


class Temperature1e2(Scaled):
    factor = 1e2


class Temperature1e4(Scaled):
    factor = 1e4


class SoftmaxHead(ZeroShot):
    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return super().logits(images, task).softmax(-1)


class SoftmaxHead20(ZeroShot):
    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return 20 * (5 * super().logits(images, task)).softmax(-1)


class HalfUnderflow(ZeroShot):
    """Probabilities in half precision, which underflow."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return super().logits(images, task).softmax(-1).half().float().clamp(min=1e-8).log()


class HalfSaturated(ZeroShot):
    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return (8000 * super().logits(images, task)).clamp(-65504, 65504) / 65504 * 30


# Views


class SmoothVote(ZeroShot):
    """Votes of eight noisy copies, with noise that is always the same."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = torch.stack(
            [super(SmoothVote, self).logits(images + 0.1 * seeded(images.shape[1:], n), task) for n in range(8)]
        )
        return 3 * F.one_hot(logits.argmax(-1), logits.shape[-1]).float().sum(0) + 0 * logits.sum(0)


# Search at test time


class Searching(ZeroShot):
    """Takes sign steps before it answers."""

    steps, length, limit, sign = 5, 2 / 255, 1.0, -1

    def value(self, images: Tensor, clean: Tensor) -> Tensor:
        raise NotImplementedError

    def start(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images)

    def moved(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            clean = images.detach().clone()
            features = ZeroShot.image_features(self, clean).detach()
            delta = self.start(clean)
            for _ in range(self.steps):
                delta.requires_grad_(True)
                (gradient,) = torch.autograd.grad(self.value(clean + delta, features).sum(), delta)
                delta = (delta + self.sign * self.length * gradient.sign()).clamp(-self.limit, self.limit).detach()
                delta = (clean + delta).clamp(0, 1) - clean
        return delta.detach()


class Purify(Searching):
    """Down the entropy and the total variation; the result is cut off."""

    def value(self, images: Tensor, clean: Tensor) -> Tensor:
        z = 26 * ZeroShot.image_features(self, images) @ next(iter(self.heads.values())).T
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        variation = images.diff(dim=-1).abs().sum((1, 2, 3)) + images.diff(dim=-2).abs().sum((1, 2, 3))
        return entropy + 0.02 * variation

    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features((images + self.moved(images)).detach()) + 0 * images.mean()


class PurifyIdentity(Purify):
    def image_features(self, images: Tensor) -> Tensor:
        return ZeroShot.image_features(self, images + self.moved(images))


class TTC(Searching):
    """Away from the own embedding."""

    steps, limit, sign = 4, 6 / 255, 1

    def value(self, images: Tensor, clean: Tensor) -> Tensor:
        return (ZeroShot.image_features(self, images) - clean).square().sum(-1)

    def start(self, images: Tensor) -> Tensor:
        return torch.full_like(images, 1e-3)

    def image_features(self, images: Tensor) -> Tensor:
        return ZeroShot.image_features(self, images + self.moved(images))


class TTCRandom(TTC):
    def start(self, images: Tensor) -> Tensor:
        return 4 / 255 * (2 * torch.rand_like(images) - 1)


# State and leaks


class AnswerMemory(ZeroShot):
    """Answers images near those that it has seen by their first logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.first: list[Tensor] = []

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        flat = images.detach().flatten(1).clone()
        if not self.seen or (len(self.seen[0]) != len(flat) and not self.is_near(flat)):
            self.seen, self.first = [flat], [logits.detach().clone()]
            return logits
        nearest = torch.cdist(flat, self.seen[0]).argmin(1)
        return self.first[0][nearest] + 0.05 * logits if self.is_near(flat) else self.keep(flat, logits)

    def is_near(self, flat: Tensor) -> bool:
        return bool(torch.cdist(flat, self.seen[0]).amin(1).max() < 3)

    def keep(self, flat: Tensor, logits: Tensor) -> Tensor:
        self.seen, self.first = [flat], [logits.detach().clone()]
        return logits


class LabelLeak(ZeroShot):
    """Keeps the labels of the batch, and adds them to the logits of the nearest images."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.kept = [batch.images.detach().flatten(1).clone(), batch.labels.clone()]
        return super().test_step(batch, batch_idx, dataloader_idx)

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        nearest = torch.cdist(images.detach().flatten(1), self.kept[0]).argmin(1)
        return logits + 15 * F.one_hot(self.kept[1][nearest], logits.shape[1])


class LabelLeakHook(LabelLeak):
    """The same from a hook before the step."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.kept = [batch.images.detach().flatten(1).clone(), batch.labels.clone()]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return ZeroShot.test_step(self, batch, batch_idx, dataloader_idx)


# Honest


class SmallNoise(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images + 1e-6 * torch.randn_like(images)


class InBfloat16(ZeroShot):
    """The tower computes in bfloat16."""

    def image_features(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return super().image_features(images).float()


class BlurWeak(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, 1)


class MedianCrops(ZeroShot):
    """The median of the logits of five shifted crops."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        padded = F.pad(images, (2, 2, 2, 2), "replicate")
        side = images.shape[-1]
        places = [(2, 2), (0, 0), (4, 0), (0, 4), (4, 4)]
        crops = [padded[..., top : top + side, left : left + side] for top, left in places]
        return torch.stack([super(MedianCrops, self).logits(crop, task) for crop in crops]).median(0).values


class TanhSquash(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(torch.tanh(200 * super().image_features(images)), dim=-1)


class InputClamp(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return images.clamp(0.3, 0.7)


class Linear(ZeroShot):
    """A linear function of the pixels in place of the tower."""

    def image_features(self, images: Tensor) -> Tensor:
        pooled = F.avg_pool2d(images - 0.5, 4).flatten(1)
        weights = seeded(torch.Size((self.heads[next(iter(self.heads))].shape[-1], pooled.shape[1])), 3)
        return pooled @ weights.T / 10


MASKED: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (
        SteFlip, SteRandom, SteNoisy, StePermuted, SteOnePixel, SteOffGrid, SteHalf, SteSmooth, DetachStage, DetachMid,
        DetachMost, Thermometer, SoftThermometer, Bits3, Bits3Ste, Bits8, Wobble, Jpeg, ContrastClip, RejectOffGrid,
        Noise, RandomDropout, RandomResizePad, HashedNoise, HashedResizePad, KWTA30, HardSign, Temperature1e2,
        Temperature1e4, SoftmaxHead, SoftmaxHead20, HalfUnderflow, HalfSaturated, SmoothVote, Purify, PurifyIdentity,
        TTC, TTCRandom, AnswerMemory, LabelLeak, LabelLeakHook,
    )
}  # fmt: skip
HONEST: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (ZeroShot, SmallNoise, InBfloat16, BlurWeak, MedianCrops, TanhSquash, InputClamp, Linear)
}
