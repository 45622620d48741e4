"""Transforms images to tensors in [0, 1], with or without augmentation."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.v2 import Resize  # keeps 8 bits while it resizes tensors

from robustclip.arguments import PositiveShare, checked
from robustclip.data.corruptions import Corruption
from robustclip.data.decoding import MAX_PIXELS, Decoder, ImageError, decoded, decoded_to_tensor
from robustclip.types import RESIZES, Crop

Picture = Image.Image | Tensor


def size_of(image: Picture) -> tuple[int, int]:
    """Returns height and width of an image in pixels."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)


def _without_border(image: Picture, border: int) -> Picture:
    if isinstance(image, Tensor):
        return image[:, border : image.shape[1] - border, border : image.shape[2] - border]
    return ImageOps.crop(image, border)


def in_unit_range(pixels: Tensor) -> Tensor:
    """Converts uint8 pixels to contiguous float32 in [0, 1], and leaves floating-point pixels as they are."""
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


class ToPixels:
    """Transforms an image to ``(3, H, W)`` float32 in [0, 1]: RGB, short side resized, centre crop.

    The crop ``clip`` gives the pixels of ``open_clip.image_transform(size, is_train=False)`` before normalisation; an
    image becomes RGB before it is resized, as torchvision's and webdataset's loaders do. A tensor ``(3, H, W)`` in
    [0, 1] is accepted as an image and is not rounded to 8 bits.

    Args:
        size: side of the crop in pixels; None keeps the image's own size.
        border: number of pixels that are cut off on every side first.
        crop: ``tecoa`` or ``clip``, which differ in the resize before the centre crop, or ``squash``, which resizes to
            a square.
        decoder: ``pillow``, or ``torchvision``, which is faster and resizes with another rounding.
    """

    def __init__(self, size: int | None, border: int = 0, crop: Crop = "tecoa", decoder: Decoder = "pillow") -> None:
        self.size, self.border, self.crop, self.decoder = size, border, crop, decoder
        if size is not None:
            target = (size, size) if RESIZES[crop].is_squashed else self._short_side
            self._resize = Resize(target, InterpolationMode(RESIZES[crop].interpolation))
            self._crop = CenterCrop(size)

    @property
    def _short_side(self) -> int:
        """Short side in pixels after the resize."""
        return RESIZES[self.crop].short_side(self.size or 0)

    @property
    def description(self) -> str:
        """Describes the transform in the protocol of a result."""
        start = f"RGB, border of {self.border} cut off" if self.border else "RGB"
        if self.size is None:
            return f"{start}, own size"
        resize = RESIZES[self.crop]
        how = f"{resize.interpolation} antialiased{' by torchvision' if self.decoder == 'torchvision' else ''}"
        if resize.is_squashed:
            return f"{start}, squashed to {self.size} x {self.size} {how}"
        return f"{start}, short side {self._short_side} {how}, centre crop {self.size}"

    def __call__(self, image: Picture, key: tuple[int, ...] = ()) -> Tensor:
        """Transforms one image to ``(3, H, W)`` float32 in [0, 1].

        Args:
            image: PIL image, or tensor ``(3, H, W)`` in [0, 1].
            key: numbers that determine random transforms, such as epoch and sample id.

        Raises:
            ImageError: the image is damaged, too small or too large.
        """
        return in_unit_range(self.stored(image, key))

    def stored(self, image: Picture, key: tuple[int, ...] = ()) -> Tensor:
        """Transforms one image to ``(3, H, W)`` uint8, or to float32 in [0, 1] if it has more than 8 bits a channel.

        Args:
            image: as for a call.
            key: as for a call.

        Raises:
            ImageError: as for a call.
        """
        if isinstance(image, Tensor):
            image = image.float()
        else:
            image = decoded_to_tensor(image) if self.decoder == "torchvision" else decoded(image)
        self._check_size(*size_of(image))
        image = self.fitted(_without_border(image, self.border), key)
        if isinstance(image, Tensor):
            return image.clamp(0, 1).contiguous() if image.is_floating_point() else image
        values = torch.from_numpy(np.array(image))
        if image.mode == "F":
            return values.clamp(0, 1).repeat(3, 1, 1)  # bicubic resizing overshoots
        return values.permute(2, 0, 1)

    def _check_size(self, height: int, width: int) -> None:
        """Refuses images without pixels inside the border, or with more pixels after resizing than `MAX_PIXELS`."""
        short, long = sorted((width - 2 * self.border, height - 2 * self.border))
        if short < 1:
            raise ImageError(f"{width} x {height} pixels leave nothing without a border of {self.border}")
        if (
            self.size is not None
            and not RESIZES[self.crop].is_squashed
            and self._short_side**2 * long / short > MAX_PIXELS
        ):
            raise ImageError(f"{width} x {height} pixels are too many to resize to a short side of {self.size}")

    def fitted(self, image: Picture, key: tuple[int, ...]) -> Picture:
        """Resizes and crops an image to its final size.

        Args:
            image: image without its border.
            key: numbers that determine random transforms.
        """
        return image if self.size is None else self._crop(self._resize(image))


@checked
@dataclass(frozen=True)
class Augmentation:
    """Random crops of training images, resized (bicubic) to the size of images without augmentation.

    Args:
        scale: least and greatest share of an image's area in a crop.
        flip: mirror an image with probability 0.5.

    Raises:
        ValueError: a share is outside of (0, 1], or the first exceeds the second.
    """

    scale: tuple[PositiveShare, PositiveShare] = (0.9, 1.0)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augmentation scale must rise within (0, 1], got {self.scale}; [1, 1] crops least")


class AugmentedPixels(ToPixels):
    """Transforms training images at random; seed and key alone determine the result, so that a run can be resumed.

    Args:
        size: side of the result in pixels; None keeps the image's own size.
        augmentation: range of the random crops.
        seed: seed of the run.
        decoder: see `ToPixels`.
    """

    def __init__(self, size: int | None, augmentation: Augmentation, seed: int, decoder: Decoder = "pillow") -> None:
        super().__init__(size, decoder=decoder)
        self.augmentation, self.seed = augmentation, seed
        self._flip = RandomHorizontalFlip(0.5 if augmentation.flip else 0.0)

    @property
    def description(self) -> str:
        """Describes the transform for a reader; only the transform without augmentation is part of a protocol."""
        least, most = self.augmentation.scale
        size = "own size" if self.size is None else f"size {self.size}"
        flip = ", mirrored at random" if self.augmentation.flip else ""
        return f"RGB, random crop of {least:g} to {most:g} of the area, bicubic antialiased to {size}{flip}"

    def fitted(self, image: Picture, key: tuple[int, ...]) -> Picture:
        """Crops the image at random and resizes the crop to the final size."""
        size = size_of(image) if self.size is None else (self.size, self.size)
        crop = RandomResizedCrop(size, self.augmentation.scale, interpolation=InterpolationMode.BICUBIC)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also restart the random streams of all GPUs.
            torch.default_generator.manual_seed(Random(repr((self.seed, *key))).getrandbits(63))
            result: Picture = self._flip(crop(image))
        return result


class CorruptedPixels(ToPixels):
    """Transforms the images of a test set as the other transforms do, and corrupts the result, rounded to 8 bits.

    Args:
        args: arguments of `ToPixels`.
        corruption: kind and severity of the corruption.
    """

    def __init__(self, *args: Any, corruption: Corruption) -> None:
        super().__init__(*args)
        self.corruption = corruption

    def stored(self, image: Picture, key: tuple[int, ...] = ()) -> Tensor:
        """Transforms one image to ``(3, H, W)`` uint8; the last number of the key is the sample id."""
        pixels = super().stored(image, key)
        levels = pixels.double() if pixels.is_floating_point() else pixels.double() / 255
        return torch.from_numpy(self.corruption(levels.permute(1, 2, 0).numpy(), key[-1])).permute(2, 0, 1)


def training_pixels(plain: ToPixels, augmentation: Augmentation | None, seed: int) -> ToPixels:
    """Returns the transform of training images.

    Args:
        plain: transform of images without augmentation.
        augmentation: random crops; None for none.
        seed: seed of the run.
    """
    if augmentation is None:
        return ToPixels(plain.size, crop=plain.crop, decoder=plain.decoder)
    return AugmentedPixels(plain.size, augmentation, seed, plain.decoder)
