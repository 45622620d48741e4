"""Further defences that only hide their gradients: in the network, by the mode, the batch, the sample or the grid.

Each is the undefended model of the shapes world with one change, as in `masked`.
"""

import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
from masked import Filtered, checksums, same, seeded, through
from torch import Tensor
from torch.nn import functional as F

from robustclip.methods import RobustMethod, ZeroShot

Turn = Callable[[Tensor, Tensor], Tensor]


def mixed(images: Tensor) -> Tensor:
    """Noise that the image's own pixels seed."""
    return torch.stack([seeded(images.shape[1:], number) for number in checksums(images)])


def off_grid(images: Tensor) -> Tensor:
    """Whether each image has pixels between the 256 levels."""
    return ((images * 255) - (images * 255).round()).abs().flatten(1).amax(1) > 1e-3


def per_image(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


# The backward pass is wrong inside the network


class Inside(ZeroShot):
    """Changes the output of one stage of the tower."""

    stage = "layer3"

    def __init__(self) -> None:
        super().__init__()
        self.clip.net.visual.get_submodule(self.stage).register_forward_hook(lambda _, __, out: self.change(out))

    def change(self, maps: Tensor) -> Tensor:
        raise NotImplementedError


class MidShuffled(Inside):
    """The gradients of a stage belong to other channels."""

    def change(self, maps: Tensor) -> Tensor:
        return through(maps, same, lambda g, x: g.roll(3, 1))


class MidHalf(Inside):
    """Half of the channels have no gradient."""

    def change(self, maps: Tensor) -> Tensor:
        half = maps.shape[1] // 2
        return torch.cat([maps[:, :half].detach(), maps[:, half:]], 1)


class MidNoisy(Inside):
    """Noise on a stage's gradient, which the stage's values seed, so that it repeats."""

    def change(self, maps: Tensor) -> Tensor:
        def noisy(g: Tensor, x: Tensor) -> Tensor:
            numbers = [zlib.crc32(part.numpy().tobytes()) for part in x.detach()]
            return g + 8 * g.std() * torch.stack([seeded(g.shape[1:], number) for number in numbers])

        return through(maps, same, noisy)


class MidDropHashed(Inside):
    """Half of a stage's values vanish, by a mask that the values seed."""

    def change(self, maps: Tensor) -> Tensor:
        numbers = [zlib.crc32(part.numpy().tobytes()) for part in maps.detach()]
        return maps * 2 * torch.stack([(seeded(maps.shape[1:], number) > 0).float() for number in numbers])


# Wrong for a part of the images, colours or samples


class SteBlue(Filtered):
    """Two of three colours have no gradient."""

    def change(self, images: Tensor) -> Tensor:
        return torch.cat([images[:, :2].detach(), images[:, 2:]], 1)


class SteHighPass(Filtered):
    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: g - 1.5 * F.avg_pool2d(g, 5, 1, 2))


class SteSomeSamples(Filtered):
    """The gradient is turned round for one sample of six, chosen by its colours."""

    share = 6

    def change(self, images: Tensor) -> Tensor:
        coarse = (F.avg_pool2d(images.detach(), 16) * 6).round().flatten(1).sum(1).long()
        return through(images, same, lambda g, x: torch.where(per_image(coarse % self.share == 0), -g, g))


class SteSomeClasses(ZeroShot):
    """The gradient is turned round where the model predicts one of three classes."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        with torch.no_grad():
            is_turned = super().logits(images, task).argmax(-1) < 3
        return super().logits(through(images, same, lambda g, x: torch.where(per_image(is_turned), -g, g)), task)


class SteNearBoundary(ZeroShot):
    """The gradient is turned round near the boundary."""

    width = 1.5

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        with torch.no_grad():
            top = super().logits(images, task).topk(2, -1).values
        is_near = top[:, 0] - top[:, 1] < self.width
        return super().logits(through(images, same, lambda g, x: torch.where(per_image(is_near), -g, g)), task)


# By the 8-bit grid


class OffGridBlur(Filtered):
    """Images off the 8-bit grid are blurred, which the gradient knows."""

    def change(self, images: Tensor) -> Tensor:
        blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), "replicate"), 5, 1)
        return torch.where(per_image(off_grid(images)), blurred, images)


class OffGridCoarse(Filtered):
    """Images off the 8-bit grid are rounded to five levels."""

    def change(self, images: Tensor) -> Tensor:
        coarse = images + ((images * 4).round() / 4 - images).detach()
        return torch.where(per_image(off_grid(images)), coarse, images)


class SoftBits(Filtered):
    """A smooth staircase of eight levels."""

    def change(self, images: Tensor) -> Tensor:
        levels = (torch.arange(7) + 0.5) / 7
        return torch.sigmoid(300 * (images[..., None] - levels)).mean(-1)


class LowBitsNoise(Filtered):
    """Noise that the three lowest bits of every pixel choose."""

    def change(self, images: Tensor) -> Tensor:
        bits = (images.detach() * 255).round().long() % 8
        return images + 0.08 * torch.sin(17.0 * bits + 5.0 * torch.arange(images.shape[-1]))


# By the mode


class GradNoisy(Filtered):
    """Images that require gradients get noise; others do not."""

    def change(self, images: Tensor) -> Tensor:
        return images + 0.15 * mixed(images) if images.requires_grad else images


class GradTop(ZeroShot):
    """With gradients on, the prediction of the mirrored image is added, without gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        if not images.requires_grad:
            return logits
        with torch.no_grad():
            blurred = super().logits(F.avg_pool2d(images, 3, 1, 1), task)
        return logits + 20 * F.one_hot(blurred.argmax(-1), logits.shape[1])


# By the batch


class BatchOfEights(Filtered):
    """The gradient is noise in batches of a size that eight divides."""

    def change(self, images: Tensor) -> Tensor:
        return through(images, same, lambda g, x: mixed(x) * g.std() if len(x) % 8 == 0 else g)


class FirstOfBatch(Filtered):
    """Only the first half of a batch has the right gradient."""

    def change(self, images: Tensor) -> Tensor:
        is_late = torch.arange(len(images)) >= (len(images) + 1) // 2
        return through(images, same, lambda g, x: torch.where(per_image(is_late), -g, g))


# By the stack, the number of calls or the time


class StackHonest(Filtered):
    """The gradient is right if a function of the examination of gradients calls."""

    places = ("gradient_probes",)

    def change(self, images: Tensor) -> Tensor:
        frame, names = sys._getframe(), ""
        while frame is not None:
            names, frame = names + frame.f_code.co_filename, frame.f_back  # type: ignore[assignment]
        return through(images, same, lambda g, x: g if any(p in names for p in self.places) else mixed(x) * g.std())


class StackHonestProbes(StackHonest):
    """The gradient is right in all probes."""

    places = ("probe",)


class AfterCalls(Filtered):
    """The gradient is noise from the fourth gradient after a test step on, for twelve gradients."""

    first, last = 4, 16

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.calls[0] = 0
        return super().test_step(batch, batch_idx, dataloader_idx)

    def change(self, images: Tensor) -> Tensor:
        self.calls[0] += images.requires_grad
        is_off = self.first <= self.calls[0] < self.last
        return through(images, same, lambda g, x: mixed(x) * g.std() if is_off else g)


class OwnGenerator(Filtered):
    """Noise on the gradient, from a generator of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = [torch.Generator().manual_seed(0)]

    def change(self, images: Tensor) -> Tensor:
        def noisy(g: Tensor, x: Tensor) -> Tensor:
            return g + 8 * g.flatten(1).std(1).view(-1, 1, 1, 1) * torch.randn(g.shape, generator=self.generator[0])

        return through(images, same, noisy)


# Memory


REMEMBERED: list[Tensor] = []


class ClosureMemory(ZeroShot):
    """Keeps the images of a test step outside of the model; near them, the answer is the first one."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        answer = super().test_step(batch, batch_idx, dataloader_idx)
        REMEMBERED[:] = [batch.images.detach().flatten(1).clone(), answer.detach().clone()]
        return answer

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        if not REMEMBERED or REMEMBERED[1].shape[1] != logits.shape[1]:
            return logits
        distance, place = torch.cdist(images.detach().flatten(1), REMEMBERED[0]).min(1)
        first = REMEMBERED[1][place]
        return torch.where((distance < 1.5)[:, None], first + 0.2 * (logits - first), logits)


class DistanceGate(ZeroShot):
    """The gradient is turned round beyond 2/255 of a remembered image."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.kept = [batch.images.detach().flatten(1).clone()]
        return super().test_step(batch, batch_idx, dataloader_idx)

    def image_features(self, images: Tensor) -> Tensor:
        if not getattr(self, "kept", None):
            return super().image_features(images)
        flat = images.detach().flatten(1)
        far = torch.stack([(flat - kept).abs().amax(1) for kept in self.kept[0]]).amin(0)
        is_far = (far > 2 / 255) & (far < 6 / 255)
        return super().image_features(through(images, same, lambda g, x: torch.where(per_image(is_far), -g, g)))


# Logits


class HardLabelBlurred(ZeroShot):
    """One-hot answers with the gradient of a blurred image."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        with torch.no_grad():
            logits = super().logits(images, task)
        blurred = super().logits(F.avg_pool2d(images, 7, 1, 3), task)
        return 10.0 * F.one_hot(logits.argmax(-1), logits.shape[1]) + blurred - blurred.detach()


class TopTwoSwapped(ZeroShot):
    """The gradients of the two largest logits are exchanged."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        places = logits.topk(2, -1).indices
        swapped = logits.scatter(1, places, logits.gather(1, places.flip(1)))
        return logits.detach() + swapped - swapped.detach()


class Sine(ZeroShot):
    """A fast small wave on the logits."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        return logits + 0.3 * torch.sin(200 * logits)


# Purification


class BlurLoop(Filtered):
    """Five steps towards the blurred image, by autograd, with the gradient of a straight line."""

    def change(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            y = images.detach().clone()
            for _ in range(5):
                y.requires_grad_(True)
                variation = y.diff(dim=-1).square().sum() + y.diff(dim=-2).square().sum()
                y = (y - 0.1 * torch.autograd.grad(variation, y)[0]).clamp(0, 1).detach()
        return images + (y - images).detach()


class LowRank(Filtered):
    """Eight singular values of every channel are kept, without a gradient of the vectors."""

    def change(self, images: Tensor) -> Tensor:
        u, _, v = torch.linalg.svd(images.detach())
        return u[..., :8] @ (u[..., :8].mT @ images @ v[..., :8, :].mT) @ v[..., :8, :]


class PurifyEveryOther(Filtered):
    """Adds the sign of the own feature's gradient, with the gradient of another image."""

    def change(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = images.detach().clone().requires_grad_()
            features = ZeroShot.image_features(self, x)
            z = 26 * features @ next(iter(self.heads.values())).T
            (gradient,) = torch.autograd.grad(z.logsumexp(-1).sum(), x)
        return images.flip(-1) - images.flip(-1).detach() + (images + 3 / 255 * gradient.sign()).detach()


FURTHER: dict[str, type[RobustMethod]] = {
    cls.__name__: cls
    for cls in (
        MidShuffled, MidHalf, MidNoisy, MidDropHashed, SteBlue, SteHighPass, SteSomeSamples, SteSomeClasses,
        SteNearBoundary, OffGridBlur, OffGridCoarse, SoftBits, LowBitsNoise, GradNoisy, GradTop, BatchOfEights,
        FirstOfBatch, StackHonest, StackHonestProbes, AfterCalls, OwnGenerator, ClosureMemory, DistanceGate,
        HardLabelBlurred, TopTwoSwapped, Sine, BlurLoop, LowRank, PurifyEveryOther,
    )
}  # fmt: skip
