"""Decodes image files of every mode to RGB or floating point, and refuses unreadable or ambiguous images."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

Decoder = Literal["pillow", "torchvision"]
"""Library that decodes JPEG files and resizes images of all formats."""

MAX_PIXELS = 89_478_485  # Pillow's MAX_IMAGE_PIXELS, beyond which it suspects a decompression bomb
BITS_PER_SAMPLE = 258  # TIFF tag
AT_MOST_16_BITS = ("PNG", "PPM")  # formats whose mode "I" holds 16 bits; Pillow scales PPM to them


class ImageError(ValueError):
    """Raised for an image that cannot be decoded, is too large, or has values of an unknown range."""


# Errors of a file or its content; some data sets of torchvision have a decoder of their own that raises SyntaxError.
DECODING_ERRORS = (OSError, ImageError, SyntaxError)


def open_image(data: bytes) -> Image.Image:
    """Opens an encoded image without decoding its pixels; `decoded` does that.

    Raises:
        ImageError: the format is not recognised, or the header is damaged.
    """
    with _decoder():
        try:
            return Image.open(BytesIO(data))
        except UnidentifiedImageError:  # its message has the address of the buffer in place of a name
            raise ImageError(f"{len(data)} bytes are no image of a known format") from None


def open_file(path: str) -> Image.Image:
    """Opens an image file as `open_image` does; torchvision's data sets use this function as their loader.

    Raises:
        OSError: the file cannot be read.
        ImageError: as for `open_image`.
    """
    return open_image(Path(path).read_bytes())


def decoded(image: Image.Image) -> Image.Image:
    """Decodes an image to mode ``RGB`` with 8 bits a channel, or to mode ``F`` with one channel in [0, 1].

    - 16-bit greyscale (PNG, PGM, TIFF, JPEG 2000) is divided by its largest possible value and becomes ``F``.
    - Floating point (TIFF, PFM) stays as it is; values outside of [0, 1] are refused.
    - 32-bit integers are refused, since their range is unknown.
    - Every other mode (1, L, P, LA, PA, RGBA, CMYK, YCbCr, LAB, HSV) is converted by Pillow's ``convert("RGB")``, as
      in open_clip and clip_benchmark: alpha and transparent palette entries are dropped without blending, EXIF
      orientation and colour profiles are ignored, and the first of several frames is used.

    Raises:
        ImageError: damaged data, more than `MAX_PIXELS` pixels, or a mode or value that is refused.
    """
    _check_pixels(image)
    with _decoder():
        image.load()
        if image.mode == "F":
            values = np.asarray(image)
        elif image.mode.startswith("I"):
            values = np.asarray(image, np.float32) / _largest(image)
        else:
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy the pixels
    if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
        raise ImageError(f"values must be in [0, 1], found {values.min():.3g} to {values.max():.3g}")
    return Image.fromarray(values)


def decoded_to_tensor(image: Image.Image) -> Tensor:
    """Decodes an image to ``(3, H, W)`` uint8, or float32 in [0, 1] if it has more than 8 bits a channel.

    torchvision decodes JPEG in colour or greyscale, to the pixels of Pillow in less time; Pillow decodes all the rest.

    Raises:
        ImageError: as for `decoded`.
    """
    content = getattr(image, "fp", None)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and isinstance(content, BytesIO):
        _check_pixels(image)
        with _decoder():
            encoded = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
            pixels: Tensor = decode_image(encoded, ImageReadMode.RGB)
            return pixels
    image = decoded(image)
    values = torch.from_numpy(np.array(image))
    return values.repeat(3, 1, 1) if image.mode == "F" else values.permute(2, 0, 1)


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"image has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Converts an image that `decoded` returned to mode ``RGB``, for models that accept no other."""
    return image.point(lambda value: value * 255 + 0.5).convert("RGB") if image.mode == "F" else image


def _largest(image: Image.Image) -> int:
    """Returns the largest possible value of an integer image."""
    if image.mode == "I" and image.format not in AT_MOST_16_BITS:
        raise ImageError("image has 32-bit integers, whose range is unknown; convert it to 8 or 16 bits")
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]  # TIFF has 12 bits too
    return (1 << int(bits)) - 1


@contextmanager
def _decoder() -> Iterator[None]:
    """Converts any error of Pillow's plugins on damaged data to `ImageError`; no other code belongs inside."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error
