"""Every image mode becomes pixels in [0, 1] as documented; what cannot be decoded is one class of error."""

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustclip.data.decoding import MAX_PIXELS, ImageError, decoded, in_eight_bits, open_image
from robustclip.data.samples import BadSample, Images, digest_of
from robustclip.data.sources.folder import ImageFiles
from robustclip.data.transforms import Augmentation, AugmentedPixels, ToPixels

RAMP = np.arange(1600).reshape(40, 40) / 1599
FORMATS = [
    "PNG",
    "JPEG",
    "JPEG2000",
    "WEBP",
    "AVIF",
    "TIFF",
    "GIF",
    "BMP",
    "DDS",
    "ICO",
    "PCX",
    "PPM",
    "SGI",
    "TGA",
    "QOI",
]


def encoded(image: Image.Image | np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> Tensor:
    return ToPixels(None)(open_image(data))


def pgm(maximum: int, values: np.ndarray[Any, Any]) -> bytes:
    return b"P5 40 40 %d\n" % maximum + values.astype(">u2").tobytes()


def tiff(values: np.ndarray[Any, Any], order: str) -> bytes:
    """An uncompressed greyscale TIFF of 16 bits a pixel, least (<) or most (>) significant byte first."""
    entries = [(256, 40), (257, 40), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 40), (279, 3200)]
    data = values.astype(f"{order}u2").tobytes()
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    return start + data + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        encoded((RAMP * 65535).astype(np.uint16), "PNG"),
        encoded((RAMP * 65535).astype(np.uint16), "PPM"),
        encoded((RAMP * 65535).astype(np.uint16), "TIFF"),
        encoded((RAMP * 65535).astype(np.uint16), "JPEG2000"),
        tiff(RAMP * 65535, "<"),
        tiff(RAMP * 65535, ">"),
        pgm(4095, RAMP * 4095),
        encoded(RAMP.astype(np.float32), "TIFF"),
    ],
    ids=["png", "pgm", "tiff", "jp2", "tiff-little", "tiff-big", "pgm-12-bit", "tiff-float"],
)
def test_more_than_eight_bits_keep_their_range_and_precision(data: bytes) -> None:
    found = pixels(data)
    assert found.dtype == torch.float32
    assert found.shape == (3, 40, 40)
    assert found[0].numpy() == pytest.approx(RAMP, abs=1.01 / 4095)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [None, 16])
def test_floating_point_pixels_stay_in_range_after_resizing_and_augmentation(size: int | None) -> None:
    checkers = np.indices((40, 40)).sum(0) % 2
    image = open_image(encoded(checkers.astype(np.float32), "TIFF"))
    for transform in (ToPixels(size), AugmentedPixels(size, Augmentation((0.3, 0.5), flip=True), seed=0)):
        found = transform(image, (0, 0))
        assert found.shape == (3, size or 40, size or 40)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded((RAMP * 2**30).astype(np.int32), "TIFF"), "32-bit integers"),
        (encoded((RAMP * 255).astype(np.float32), "TIFF"), r"\[0, 1\], found 0 to 255"),
        (encoded((RAMP - 0.1).astype(np.float32), "TIFF"), r"\[0, 1\], found -0.1 to 0.9"),
        (encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), r"\[0, 1\], found nan"),
    ],
)
def test_values_of_an_unknown_range_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decoded(open_image(data))


def test_alpha_palettes_and_orientation_are_dropped_as_in_open_clip() -> None:
    """The colour of a transparent pixel is kept; nothing is blended, and nothing is turned."""
    red = (200, 30, 10)
    expected = torch.tensor(red).view(3, 1, 1).expand(3, 6, 4) / 255
    image = Image.new("RGBA", (4, 6), (*red, 0))
    assert torch.equal(pixels(encoded(image, "PNG")), expected)
    palette = Image.new("RGB", (4, 6), red).quantize(4)
    assert torch.equal(pixels(encoded(palette, "PNG", transparency=0)), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert torch.equal(pixels(encoded(Image.new("RGB", (4, 6), red), "PNG", exif=exif.tobytes())), expected)


@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("LA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF")]
)
def test_white_is_white_in_every_mode(mode: str, kind: str) -> None:
    white = {"1": 1, "LA": (255, 7), "CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128), "LAB": (255, 128, 128)}[mode]
    assert float(pixels(encoded(Image.new(mode, (4, 4), white), kind)).min()) >= 0.99


def test_eight_bits_round_to_the_nearest_level() -> None:
    image = decoded(open_image(encoded((RAMP * 65535).astype(np.uint16), "PNG")))
    assert np.asarray(in_eight_bits(image))[..., 0] == pytest.approx(RAMP * 255, abs=0.51)


def bomb(width: int, height: int) -> bytes:
    """A PNG that has the header of an image of any size, and next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bomb(13000, 13000), f"13000 x 13000 pixels, more than {MAX_PIXELS:,}"),
        (bomb(100_000, 100_000), "exceeds limit"),
        (encoded(Image.new("L", (60_000, 1)), "PNG"), "60000 x 1 pixels are too many to resize"),
    ],
)
def test_huge_images_are_refused_before_they_are_decoded(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        ToPixels(224)(open_image(data))


def test_an_image_that_is_smaller_than_its_border_is_refused() -> None:
    with pytest.raises(ImageError, match="8 x 8 pixels leave nothing without a border of 4"):
        ToPixels(None, border=4)(Image.new("RGB", (8, 8)))


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_of_any_format_are_bad_samples(kind: str, tmp_path: Path) -> None:
    """Cut anywhere, or with bytes of noise: pixels or one class of error, whatever the decoder raises."""
    draw = random.Random(kind)
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    whole = encoded(noise, kind)
    (tmp_path / "a").mkdir()
    file = tmp_path / f"a/0.{'png' if kind not in ('JPEG', 'WEBP') else kind.lower()}"
    file.write_bytes(whole)
    images = Images(ImageFiles([(str(file), 0)]), ToPixels(8))
    assert not isinstance(images[0], BadSample)
    bad = 0
    for trial in range(120):
        data = bytearray(whole[: draw.randrange(1, len(whole))] if trial % 2 else whole)
        for _ in range(draw.choice((1, 4, 16))):
            data[draw.randrange(len(data) if trial % 3 else min(64, len(data)))] = draw.randrange(256)
        file.write_bytes(data)
        sample = images[0]
        bad += isinstance(sample, BadSample)
        assert isinstance(sample, BadSample) or sample[0].shape == (3, 8, 8)
    assert bad > 20


def test_mistakes_in_a_transform_are_no_bad_samples(tmp_path: Path) -> None:
    class Mistaken(ToPixels):
        def fitted(self, image: Image.Image, key: tuple[int, ...]) -> Image.Image:
            raise ValueError("a mistake of ours")

    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="a mistake of ours"):
        Images(ImageFiles([(str(tmp_path / "a" / "0.png"), 0)]), Mistaken(None))[0]


def test_a_digest_is_equal_for_equal_pixels_only() -> None:
    image = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert digest_of(image) == digest_of(image.clone())
    changed = image.clone()
    changed[0, 0, 0] += 1e-6
    others = [changed, image.view(3, 6, 4), image.flip(0), image.half().float()]
    assert len({digest_of(each) for each in [image, *others]}) == 5
    assert len(digest_of(image)) == 16
