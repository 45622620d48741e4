"""Decoding and resizing by torchvision: equal pixels without a resize, equal refusals, and its own protocol."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.data.decoding import Decoder, ImageError, open_image
from robustclip.data.samples import digest_of
from robustclip.data.transforms import Augmentation, AugmentedPixels, ToPixels

MODES = ["RGB", "L", "CMYK", "P", "RGBA", "I;16"]


def picture(mode: str = "RGB", form: str = "JPEG", size: tuple[int, int] = (61, 47)) -> bytes:
    """Encodes a smooth picture with some noise."""
    random, file = np.random.default_rng(0), io.BytesIO()
    values = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3) + random.integers(0, 40, 3)
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((values[..., 0] * 200).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(file, form)
    return file.getvalue()


def by(decoder: Decoder, data: bytes, **options: object) -> Tensor:
    return ToPixels(options.pop("size", None), decoder=decoder, **options)(open_image(data))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_both_decoders_give_equal_pixels_of_the_own_size(mode: str) -> None:
    data = picture(mode, "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG")
    assert torch.equal(by("torchvision", data), by("pillow", data))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("crop", ["tecoa", "clip"])
def test_resized_pixels_differ_by_rounding_alone(mode: str, crop: str) -> None:
    data = picture(mode, "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG")
    one, other = (by(decoder, data, size=32, crop=crop) for decoder in ("pillow", "torchvision"))
    assert one.shape == other.shape == (3, 32, 32)
    assert (one - other).abs().max() <= 2 / 255 + 1e-6
    assert (one - other).abs().mean() < 0.3 / 255


def test_the_augmented_crops_of_both_decoders_are_the_same_regions() -> None:
    data, augmentation = picture(), Augmentation((0.3, 0.6), flip=True)
    for epoch in range(4):
        one, other = (
            AugmentedPixels(24, augmentation, 0, decoder)(open_image(data), (epoch, 7))
            for decoder in ("pillow", "torchvision")
        )
        assert (one - other).abs().max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize("end", [300, -2])
def test_a_cut_file_is_refused_by_both(end: int) -> None:
    for decoder in ("pillow", "torchvision"):
        with pytest.raises(ImageError):
            by(decoder, picture()[:end])


def test_the_protocol_states_the_decoder() -> None:
    modules = [CLIPDataModule(test="shapes:colours", image_size=32, decoder=name) for name in ("pillow", "torchvision")]
    for module in modules:
        module.attack_resolution = "model"
        module.setup("test")
    first, second = (module.protocol("colours")["preprocessing"] for module in modules)
    assert second == first.replace("antialiased", "antialiased by torchvision")
    assert first != second


def test_a_digest_does_not_depend_on_the_type_of_the_pixels() -> None:
    transform, data = ToPixels(None), picture()
    stored, floats = transform.stored(open_image(data)), transform(open_image(data))
    assert (stored.dtype, floats.dtype) == (torch.uint8, torch.float32)
    assert digest_of(stored) == digest_of(floats)
    floats[0, 0, 0] += 1e-6
    assert digest_of(floats) != digest_of(stored)
