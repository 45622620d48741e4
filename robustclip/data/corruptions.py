"""The fifteen corruptions of ImageNet-C at five severities, drawn anew for every sample id."""

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from robustclip.data.decoding import ImageError, decoded, in_eight_bits, open_image
from robustclip.data.image_filters import convolved, fractal_heights, moved_along, picture_of, sampled, smoothed, zoomed

Array = NDArray[np.float64]
Category = Literal["noise", "blur", "weather", "digital"]
SIDE = 224  # pixels of the images for which the constants were chosen
NEEDLES, DIRECTIONS = 0.03, 8  # share of the pixels where a needle of drawn frost begins, and their directions
VERSION = 1  # of the algorithms; another one makes results that do not compare


class Kind(NamedTuple):
    """One kind of corruption.

    Attributes:
        category: group of kinds in the paper.
        constants: constants of the severities 1 to 5.
        function: corrupts an image ``(H, W, 3)`` in [0, 1], given constants, random numbers, and side over 224 pixels.
    """

    category: Category
    constants: Sequence[Sequence[float]]
    function: Callable[[Array, Sequence[float], Generator, float], Array]


@dataclass(frozen=True)
class Corruption:
    """One kind and severity of Hendrycks and Dietterich, ICLR 2019 (https://arxiv.org/abs/1903.12261).

    The constants are those of the authors' code for ImageNet-C (https://github.com/hendrycks/robustness), and results
    are rounded down to 8 bits as there. Constants in pixels are multiplied by side / 224 for images of another side;
    ImageNet-C was resized to 224 pixels first, as here, and CIFAR-10-C and Tiny-ImageNet-C have constants of their own.
    Sample id, kind and severity alone determine the random numbers.

    Departures: published images were saved again as JPEG of quality 85, these are not; the photographs of frost cannot
    be packaged, so that a texture is drawn unless ``frost`` gives them.

    Args:
        kind: one of `KINDS`.
        severity: 1 to 5.
        frost: folder of photographs of frost; None draws a texture.

    Raises:
        ValueError: there is no such kind or severity.
    """

    kind: str
    severity: int
    frost: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.severity not in range(1, 6):
            known = f"one of {', '.join(KINDS)}, at a severity from 1 to 5"
            raise ValueError(f"a corruption is {known}, got {self.kind!r} at {self.severity!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, severity and a digest of everything else that determines the pixels, in JSON's types."""
        photographs = [_photograph(path)[1] for path in _photographs(self.frost)] if self.kind == "frost" else []
        content = (VERSION, KINDS[self.kind].constants[self.severity - 1], *photographs)
        return {"kind": self.kind, "severity": self.severity, "constants": _digest(repr(content).encode())}

    def __call__(self, image: Array, sample: int) -> NDArray[np.uint8]:
        """Corrupts an image.

        Args:
            image: ``(H, W, 3)`` in [0, 1].
            sample: id of the sample, at least 0.

        Returns:
            ``(H, W, 3)`` uint8.
        """
        kind, draw = KINDS[self.kind], np.random.default_rng([[*KINDS].index(self.kind), self.severity, sample])
        photographs = _photographs(self.frost)
        function = partial(_photographed_frost, photographs) if self.kind == "frost" and photographs else kind.function
        corrupted = function(image, kind.constants[self.severity - 1], draw, min(image.shape[:2]) / SIDE)
        # The tolerance keeps whole levels, such as 3.9999999 for 4, from being rounded down.
        return (corrupted.clip(0, 1) * 255 + 1e-6).astype(np.uint8)


# Noise. Of pixels, not of lengths, so that it does not depend on the side.


def _gaussian_noise(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    return image + draw.normal(0, constants[0], image.shape)


def _shot_noise(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    return draw.poisson(image * constants[0]) / constants[0]


def _impulse_noise(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Replaces a share of the values by 0 or 1."""
    is_replaced, is_white = draw.random(image.shape) < constants[0], draw.random(image.shape) < 0.5
    return np.where(is_replaced, is_white.astype(float), image)


# Blur


def _defocus_blur(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Convolves the image with a disk, whose edge is smoothed."""
    radius, alias = constants
    up, half = max(scale, 1.0), math.ceil(max(8, radius) * max(scale, 1.0))
    places = np.arange(-half, half + 1)
    disk = ((places**2 + places[:, None] ** 2) <= (radius * up) ** 2).astype(float)
    disk /= disk.sum()
    reach = math.ceil((1 if radius <= 8 else 2) * up)
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * (alias * up) ** 2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    moved = places * min(scale, 1.0)  # on small images the places of the disk are nearer, between the pixels
    reach = math.ceil(moved[-1])
    shares = (1 - abs(np.arange(-reach, reach + 1)[:, None] - moved)).clip(0)
    return convolved(image, shares @ disk @ shares.T)


def _glass_blur(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Blurs, gives every pixel the value of a random one nearby, in turn, and blurs again.

    The paper exchanges the two pixels. In the authors' code, one of them overwrites the other, and so it does here.
    """
    sigma, delta, rounds = constants[0] * scale, max(1, round(constants[1] * scale)), int(constants[2])
    height, width = image.shape[:2]
    blurred = np.floor(smoothed(image, sigma) * 255) / 255
    rows, columns = (range(side - delta, delta, -1) for side in (height, width))
    order = list(range(height * width))
    for _ in range(rounds):
        steps = draw.integers(-delta, delta, (2, len(rows) * len(columns)))
        moves = (steps[0] + steps[1] * width).tolist()
        for move, (row, column) in zip(moves, product(rows, columns), strict=True):
            place = row * width + column
            order[place] = order[place + move]
    return smoothed(blurred.reshape(-1, 3)[order].reshape(image.shape), sigma)


def _motion_blur(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    return moved_along(image, constants[0], constants[1], draw.uniform(-45, 45), scale)


def _zoom_blur(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Averages the image and enlargements of it."""
    factors = np.arange(*constants)
    average: Array = np.mean([image, *(zoomed(image, factor) for factor in factors)], axis=0)
    return average


# Weather


def _snow(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Whitens the image, and adds flakes that fall in one direction and, turned by 180 degrees, in the opposite one."""
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    flakes = zoomed(draw.normal(mean, deviation, (*image.shape[:2], 1)), max(1.0, zoom * scale))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = moved_along(flakes, radius, sigma, draw.uniform(-135, -45), scale)
    grey = image @ np.array([0.299, 0.587, 0.114])
    white: Array = np.maximum(image, grey[..., None] * 1.5 + 0.5)
    whitened: Array = kept * image + (1 - kept) * white
    return whitened + flakes + np.rot90(flakes, 2)


def _frost(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Adds a drawn texture: needles of ice on a fractal, with the brightness and tint of the authors' photographs."""
    size = image.shape[:2]
    seeds = [(draw.random((*size, 1)) < NEEDLES) * draw.normal(size=(*size, 1)) for _ in range(DIRECTIONS)]
    needles = sum(moved_along(seed, 20, 10, draw.uniform(0, 360), scale) for seed in seeds)
    relief = fractal_heights(max(size), 1.6, draw)[: size[0], : size[1], None]
    parts = [(part - part.mean()) / max(part.std(), 1e-6) for part in (np.asarray(needles), relief)]
    ice: Array = draw.uniform(0.4, 0.8) + 0.12 * parts[0] + 0.08 * parts[1] + np.array([-0.07, 0.01, 0.06])
    return constants[0] * image + constants[1] * ice.clip(0, 1)


def _photographed_frost(
    photographs: Sequence[Path], image: Array, constants: Sequence[float], draw: Generator, scale: float
) -> Array:
    """Adds a random crop of a photograph of frost."""
    photograph = _photograph(photographs[int(draw.integers(len(photographs)))])[0]
    size = [math.ceil(length / scale) for length in image.shape[1::-1]]
    enlarged = max(1.0, *(length / own for length, own in zip(size, photograph.size, strict=True)))
    if enlarged > 1:
        photograph = photograph.resize([math.ceil(own * enlarged) for own in photograph.size], Image.Resampling.BICUBIC)
    left, top = (int(draw.integers(own - length + 1)) for length, own in zip(size, photograph.size, strict=True))
    crop = photograph.crop((left, top, left + size[0], top + size[1]))
    ice = np.asarray(crop.resize(image.shape[1::-1], Image.Resampling.BICUBIC)) / 255
    return constants[0] * image + constants[1] * ice


def _fog(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Adds a fractal, and keeps the largest value."""
    density, decay = constants
    fractal = fractal_heights(max(image.shape[:2]), decay, draw)[: image.shape[0], : image.shape[1], None]
    largest = float(image.max())
    return (image + density * fractal) * largest / (largest + density)


def _brightness(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Adds to the value of every pixel, with hue and saturation kept."""
    value: Array = image.max(-1, keepdims=True)
    raised: Array = (value + constants[0]).clip(max=1)
    return np.where(value > 0, image * raised / np.where(value > 0, value, 1), raised)


# Digital


def _contrast(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    mean: Array = image.mean((0, 1))
    return (image - mean) * constants[0] + mean


def _elastic_transform(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    """Maps the image by a random affine map, then moves every pixel by a smooth random field."""
    alpha, sigma, affine = (244 * constant * scale for constant in constants)  # 244 is the authors' slip for 224
    size = np.array(image.shape[1::-1])
    centre, third = size // 2, min(size) // 3
    corners = np.array([centre + third, [centre[0] + third, centre[1] - third], centre - third], float)
    moved = corners + draw.uniform(-affine, affine, corners.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], corners)
    columns, rows = np.meshgrid(*map(np.arange, size))
    x, y = np.tensordot(back, np.stack([columns, rows, np.ones_like(rows)]), (0, 0))
    straight = sampled(image, y, x, "mirror")
    fields = [ndimage.gaussian_filter(draw.uniform(-1, 1, rows.shape), sigma, truncate=3) for _ in "xy"]
    # The smoothed field shrinks with sigma, so that the second factor makes the displacement proportional to the side.
    dx, dy = (field * alpha * scale for field in fields)
    return sampled(straight, rows + dy, columns + dx, "reflect")


def _pixelate(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    picture = picture_of(image)
    small = picture.resize([max(1, int(length * constants[0])) for length in picture.size], Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BOX)) / 255


def _jpeg_compression(image: Array, constants: Sequence[float], draw: Generator, scale: float) -> Array:
    content = io.BytesIO()
    picture_of(image).save(content, "JPEG", quality=int(constants[0]))
    return np.asarray(Image.open(content)) / 255


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        # Standard deviation.
        "gaussian_noise": Kind("noise", [[0.08], [0.12], [0.18], [0.26], [0.38]], _gaussian_noise),
        # Photons of a white pixel.
        "shot_noise": Kind("noise", [[60], [25], [12], [5], [3]], _shot_noise),
        # Share of the values.
        "impulse_noise": Kind("noise", [[0.03], [0.06], [0.09], [0.17], [0.27]], _impulse_noise),
        # Radius of the disk and deviation of its edge, in pixels.
        "defocus_blur": Kind("blur", [[3, 0.1], [4, 0.5], [6, 0.5], [8, 0.5], [10, 0.5]], _defocus_blur),
        # Deviation of the blur and largest move in pixels, rounds.
        "glass_blur": Kind("blur", [[0.7, 1, 2], [0.9, 2, 1], [1, 2, 3], [1.1, 3, 2], [1.5, 4, 2]], _glass_blur),
        # Radius and deviation in pixels.
        "motion_blur": Kind("blur", [[10, 3], [15, 5], [15, 8], [15, 12], [20, 15]], _motion_blur),
        # First factor, end and step.
        "zoom_blur": Kind(
            "blur", [[1, 1.11, 0.01], [1, 1.16, 0.01], [1, 1.21, 0.02], [1, 1.26, 0.02], [1, 1.31, 0.03]], _zoom_blur
        ),
        # Mean and deviation of the flakes, their size, their threshold, radius and deviation of the motion in pixels,
        # share of the image that is not whitened.
        "snow": Kind(
            "weather",
            [
                [0.1, 0.3, 3, 0.5, 10, 4, 0.8],
                [0.2, 0.3, 2, 0.5, 12, 4, 0.7],
                [0.55, 0.3, 4, 0.9, 12, 8, 0.7],
                [0.55, 0.3, 4.5, 0.85, 12, 8, 0.65],
                [0.55, 0.3, 2.5, 0.85, 12, 12, 0.55],
            ],
            _snow,
        ),
        # Weights of image and ice.
        "frost": Kind("weather", [[1, 0.4], [0.8, 0.6], [0.7, 0.7], [0.65, 0.7], [0.6, 0.75]], _frost),
        # Density, and factor by which details of half the size are weaker.
        "fog": Kind("weather", [[1.5, 2], [2, 2], [2.5, 1.7], [2.5, 1.5], [3, 1.4]], _fog),
        # Addition to the value.
        "brightness": Kind("weather", [[0.1], [0.2], [0.3], [0.4], [0.5]], _brightness),
        # Share of the contrast that is kept.
        "contrast": Kind("digital", [[0.4], [0.3], [0.2], [0.1], [0.05]], _contrast),
        # Strength and deviation of the field, and largest move of a corner, in shares of 244 pixels.
        "elastic_transform": Kind(
            "digital",
            [[2, 0.7, 0.1], [2, 0.08, 0.2], [0.05, 0.01, 0.02], [0.07, 0.01, 0.02], [0.12, 0.01, 0.02]],
            _elastic_transform,
        ),
        # Share of the side that is kept.
        "pixelate": Kind("digital", [[0.6], [0.5], [0.4], [0.3], [0.25]], _pixelate),
        # Quality.
        "jpeg_compression": Kind("digital", [[25], [18], [15], [10], [7]], _jpeg_compression),
    }
)
"""All kinds by name, in the order of the paper."""


@cache
def _photographs(folder: Path | None) -> tuple[Path, ...]:
    """Lists the photographs of a folder; empty without a folder.

    Raises:
        ValueError: the folder has no image.
    """
    if folder is None:
        return ()
    suffixes = (".jpg", ".jpeg", ".png")
    paths = tuple(path for path in sorted(folder.glob("*")) if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise ValueError(f"data.corruptions.frost must be a folder of .jpg or .png images, found none in {folder}")
    return paths


@cache
def _photograph(path: Path) -> tuple[Image.Image, str]:
    """Reads a photograph and its digest once per process.

    Raises:
        ValueError: the file does not decode; no `ImageError`, which would be that of the image to corrupt.
    """
    try:
        content = path.read_bytes()
        return in_eight_bits(decoded(open_image(content))), _digest(content)
    except (OSError, ImageError) as error:
        raise ValueError(f"data.corruptions.frost: {path} does not decode: {error}; remove it") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
