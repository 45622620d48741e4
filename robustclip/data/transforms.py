"""Transforms of images to tensors in [0, 1]."""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, Resize

from robustclip.arguments import PositiveShare, checked
from robustclip.data.decoding import MAX_PIXELS, ImageError, decoded

RESIZE_RATIO = 256 / 224  # the short side before the centre crop, as in CLIP's and TeCoA's evaluation


Picture = Image.Image | Tensor


def size_of(image: Picture) -> tuple[int, int]:
    """Height and width of an image."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)


def _without_border(image: Picture, border: int) -> Picture:
    if isinstance(image, Tensor):
        return image[:, border : image.shape[1] - border, border : image.shape[2] - border]
    return ImageOps.crop(image, border)


class ToPixels:
    """Turns an image into ``(3, H, W)`` float32 in [0, 1]: RGB, short side resized (bilinear), centre crop.

    A tensor ``(3, H, W)`` in [0, 1] is taken as such an image, and is not rounded to 8 bits.

    Args:
        size: side of the crop in pixels; None keeps the image's own size.
        border: pixels to cut off on every side before that.
    """

    def __init__(self, size: int | None, border: int = 0) -> None:
        self.size, self.border = size, border
        if size is not None:
            self._resize = Resize(round(size * RESIZE_RATIO), InterpolationMode.BILINEAR)
            self._crop = CenterCrop(size)

    @property
    def description(self) -> str:
        """The transform in words, for the protocol of a result."""
        start = f"RGB, border of {self.border} cut off" if self.border else "RGB"
        if self.size is None:
            return f"{start}, own size"
        return f"{start}, short side {round(self.size * RESIZE_RATIO)} bilinear antialiased, centre crop {self.size}"

    def __call__(self, image: Picture, key: tuple[int, ...] = ()) -> Tensor:
        """Transforms one image; random transforms depend on ``key``."""
        image = image.float() if isinstance(image, Tensor) else decoded(image)
        height, width = size_of(image)
        self._check_size(width, height)
        image = self.fitted(_without_border(image, self.border), key)
        if isinstance(image, Tensor):
            return image.clamp(0, 1).contiguous()
        values = torch.from_numpy(np.array(image))
        if image.mode == "F":
            return values.clamp(0, 1).repeat(3, 1, 1)  # bicubic resizing overshoots
        return values.permute(2, 0, 1).contiguous().float() / 255

    def _check_size(self, width: int, height: int) -> None:
        """Refuse what is smaller than its border, or would be resized to more pixels than a decoder may return."""
        short, long = sorted((width - 2 * self.border, height - 2 * self.border))
        if short < 1:
            raise ImageError(f"{width} x {height} pixels leave nothing without a border of {self.border}")
        if self.size is not None and round(self.size * RESIZE_RATIO) ** 2 * long / short > MAX_PIXELS:
            raise ImageError(f"{width} x {height} pixels are too many to resize to a short side of {self.size}")

    def fitted(self, image: Picture, key: tuple[int, ...]) -> Picture:
        """The image in its final size."""
        return image if self.size is None else self._crop(self._resize(image))


@checked
@dataclass(frozen=True)
class Augmentation:
    """Random crops of training images, resized (bicubic) to the size that they would have without.

    Args:
        scale: least and greatest share of an image's area.
        flip: mirror every other image, by chance.

    Raises:
        ValueError: shares that are none, or out of order.
    """

    scale: tuple[PositiveShare, PositiveShare] = (0.9, 1.0)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augmentation scale must rise within (0, 1], got {self.scale}; [1, 1] crops least")


class AugmentedPixels(ToPixels):
    """Transforms training images at random, by the seed and the key alone, so that a run can be resumed.

    Args:
        size: side of the result in pixels; None keeps the image's own size.
        augmentation: what may happen.
        seed: of the run.
    """

    def __init__(self, size: int | None, augmentation: Augmentation, seed: int) -> None:
        super().__init__(size)
        self.augmentation, self.seed = augmentation, seed
        self._flip = RandomHorizontalFlip(0.5 if augmentation.flip else 0.0)

    def fitted(self, image: Picture, key: tuple[int, ...]) -> Picture:
        """A random part of the image in the final size."""
        size = size_of(image) if self.size is None else (self.size, self.size)
        crop = RandomResizedCrop(size, self.augmentation.scale, interpolation=InterpolationMode.BICUBIC)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would start every GPU's stream anew as well.
            torch.default_generator.manual_seed(Random(repr((self.seed, *key))).getrandbits(63))
            result: Picture = self._flip(crop(image))
        return result


def training_pixels(size: int | None, augmentation: Augmentation | None, seed: int) -> ToPixels:
    """Transform of training images, with or without an augmentation."""
    return ToPixels(size) if augmentation is None else AugmentedPixels(size, augmentation, seed)
