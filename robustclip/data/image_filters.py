"""Filters and textures of images as arrays, from which corruptions are composed."""

import math

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal
from torch.nn import functional as F

Array = NDArray[np.float64]


def convolved(image: Array, kernel: Array) -> Array:
    """Convolves an image with a kernel that equals its mirror images, across mirrored borders.

    Args:
        image: ``(H, W, C)``.
        kernel: ``(K, K)``, ``K`` odd.
    """
    reach = len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    blurred: Array = signal.fftconvolve(padded, kernel[..., None], "valid", axes=(0, 1))
    return blurred


def smoothed(image: Array, sigma: float) -> Array:
    """Applies a Gaussian blur.

    Args:
        image: ``(H, W, C)``.
        sigma: deviation in pixels.
    """
    smoothed: Array = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    return smoothed


def moved_along(image: Array, radius: float, sigma: float, angle: float, scale: float) -> Array:
    """Applies ImageMagick's motion blur: a Gaussian of the way along one direction, in whole pixels.

    Args:
        image: ``(H, W, C)``.
        radius: half the number of positions on the way, for 224 pixels.
        sigma: deviation of the Gaussian in pixels, for 224 pixels.
        angle: direction in degrees.
        scale: side over 224 pixels.
    """
    up, down = max(scale, 1.0), min(scale, 1.0)
    way = np.arange(math.ceil((2 * radius + 1) * up))
    weights = np.exp(-(way**2) / (2 * (sigma * up) ** 2))
    direction = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    steps = np.stack([np.ceil(way * down * part - 0.5).astype(int) for part in direction], axis=1)
    places, numbers = np.unique(steps, axis=0, return_inverse=True)
    shares = np.bincount(numbers.ravel(), weights / weights.sum())
    moved = np.zeros(image.shape)
    for share, move in zip(shares, places, strict=True):
        rows, columns = (
            (np.arange(side) + part).clip(0, side - 1) for side, part in zip(image.shape[:2], move, strict=True)
        )
        moved += share * image[rows][:, columns]
    return moved


def zoomed(image: Array, factor: float) -> Array:
    """Enlarges the centre of an image to the image's size, by linear interpolation.

    Args:
        image: ``(H, W, C)``.
        factor: factor of the enlargement, at least 1.
    """
    height, width = image.shape[:2]
    inner = [math.ceil(side / factor) for side in (height, width)]
    top, left = ((side - part) // 2 for side, part in zip((height, width), inner, strict=True))
    centre = torch.from_numpy(image[top : top + inner[0], left : left + inner[1]]).movedim(-1, 0)
    size = [round(part * factor) for part in inner]
    enlarged = F.interpolate(centre[None], size, mode="bilinear", align_corners=True)[0].movedim(0, -1).numpy()
    top, left = ((part - side) // 2 for side, part in zip((height, width), size, strict=True))
    return enlarged[top : top + height, left : left + width]


def sampled(image: Array, rows: Array, columns: Array, mode: str) -> Array:
    """Reads an image at places between the pixels, by linear interpolation.

    Args:
        image: ``(H, W, 3)``.
        rows, columns: places ``(H, W)`` in pixels.
        mode: rule of ``scipy.ndimage`` for places outside of the image.
    """
    channels = [ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode=mode) for c in range(3)]
    return np.stack(channels, axis=-1)


def fractal_heights(side: int, decay: float, draw: Generator) -> Array:
    """Draws heights in [0, 1] by the diamond-square algorithm on a torus.

    Args:
        side: side in pixels; that of the result is the next power of two.
        decay: factor by which the random part is smaller at half the distance, before it is squared.
        draw: random numbers.
    """
    size = max(2, 1 << (side - 1).bit_length())
    heights, step, wobble = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half, shape = step // 2, (size // step, size // step)
        corners = heights[::step, ::step]
        sides = corners + np.roll(corners, -1, 0)
        middles = (sides + np.roll(sides, -1, 1)) / 4 + draw.uniform(-wobble, wobble, shape)
        heights[half::step, half::step] = middles
        for axis in (0, 1):  # between two corners along the axis, and two middles across it
            total = corners + np.roll(corners, -1, axis) + middles + np.roll(middles, 1, 1 - axis)
            place = (slice(half, None, step), slice(None, None, step))[:: 1 - 2 * axis]
            heights[place] = total / 4 + draw.uniform(-wobble, wobble, shape)
        step, wobble = half, wobble / decay**2
    heights -= heights.min()
    return heights / float(heights.max())


def picture_of(image: Array) -> Image.Image:
    """Converts an image ``(H, W, 3)`` in [0, 1] to 8 bits."""
    return Image.fromarray((image * 255).round().astype(np.uint8))
