"""The corruptions against figures of another implementation, against definitions written out, and across sides."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from robustclip.data.corruptions import KINDS, Corruption
from robustclip.data.image_filters import convolved, fractal_heights, moved_along

FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
# Mean and root mean square of the change of `picture` at severity 1, 3 and 5, in grey levels, by imagecorruptions 1.1.2
# a copy of the authors' code (means over 40 draws of random kinds). Its elastic transform is not the authors', and its
# frost has photographs.
RECORDED: dict[str, list[tuple[float, float]]] = {
    "gaussian_noise": [(-0.36, 20.22), (0.35, 44.01), (3.68, 77.95)],
    "shot_noise": [(-0.4, 21.56), (-1.26, 46.39), (-7.25, 82.02)],
    "impulse_noise": [(0.54, 23.56), (1.56, 40.84), (4.71, 70.72)],
    "defocus_blur": [(-0.52, 10.18), (-0.5, 14.82), (0.69, 19.27)],
    "glass_blur": [(-1.04, 12.66), (-0.99, 19.03), (-0.96, 19.02)],
    "motion_blur": [(-0.29, 13.25), (-0.01, 22.3), (0.29, 27.87)],
    "zoom_blur": [(-1.57, 19.19), (-2.37, 23.8), (-3.12, 26.99)],
    "snow": [(41.85, 45.89), (69.4, 75.28), (101.87, 106.33)],
    "fog": [(-3.58, 38.32), (-4.87, 44.21), (1.3, 48.25)],
    "brightness": [(18.94, 19.99), (55.32, 58.76), (78.55, 85.83)],
    "contrast": [(-0.51, 25.15), (-0.49, 33.53), (-0.49, 39.81)],
    "pixelate": [(0.36, 7.01), (0.18, 10.9), (0.29, 12.89)],
    "jpeg_compression": [(0.05, 9.34), (0.08, 11.07), (-0.07, 15.79)],
}


def picture(height: int = 224, width: int = 224) -> NDArray[np.uint8]:
    """Waves and tiles, in 8 bits."""
    y, x = np.mgrid[:height, :width] / 224
    waves = [
        0.5 + 0.3 * np.sin(9 * x + 5 * y) * np.cos(7 * y),
        0.4 + 0.35 * np.cos(4 * x * y + 11 * y),
        0.55 + 0.25 * np.sin(20 * x) * np.sin(3 * y),
    ]
    tiles = ((x * 12).astype(int) + (y * 12).astype(int)) % 2
    levels = (np.stack(waves, -1) * 0.7 + 0.3 * tiles[..., None] * np.array([1, 0.6, 0.2])) * 255
    return levels.round().astype(np.uint8)


def change(kind: str, severity: int, draws: int = 1) -> NDArray[Any]:
    image = picture()
    return np.stack(
        [Corruption(kind, severity)(image / 255, sample).astype(float) - image.astype(float) for sample in range(draws)]
    )


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("motion_blur", "snow", "fog") else []) for kind in RECORDED],
)
def test_the_change_is_that_of_the_authors_code(kind: str) -> None:
    """Fixed kinds to the rounding; random ones to the spread of a few draws, which fog and snow share over an image."""
    for severity, (mean, rms) in zip((1, 3, 5), RECORDED[kind], strict=True):
        draws = {"fog": 24, "motion_blur": 12}.get(kind, 1 if kind in (*FIXED, "glass_blur") else 4)
        found = change(kind, severity, draws)
        slack = {"fog": 9.0, "snow": 1.5}.get(kind, 0.15 if kind in FIXED else 0.5)
        assert found.mean() == pytest.approx(mean, abs=slack), severity
        assert np.sqrt((found**2).mean()) == pytest.approx(rms, rel=0.005 if kind in FIXED else 0.05), severity


def test_contrast_brightness_pixelate_and_jpeg_equal_their_definitions() -> None:
    image = picture()
    mean = image.mean((0, 1)) / 255
    assert np.array_equal(
        Corruption("contrast", 2)(image / 255, 0), np.floor((((image / 255) - mean) * 0.3 + mean) * 255 + 1e-6)
    )
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(int)
    bright = np.asarray(Image.fromarray(Corruption("brightness", 3)(image / 255, 0)).convert("HSV")).astype(int)
    assert np.abs(np.minimum(hsv[..., 2] + 76.5, 255) - bright[..., 2]).max() <= 1
    small = Image.fromarray(image).resize((89, 89), Image.Resampling.BOX)  # 224 * 0.4 = 89.6
    assert np.array_equal(
        Corruption("pixelate", 3)(image / 255, 0), np.asarray(small.resize((224, 224), Image.Resampling.NEAREST))
    )
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=15)
    assert np.array_equal(Corruption("jpeg_compression", 3)(image / 255, 0), np.asarray(Image.open(content)))


def test_zoom_blur_is_the_mean_of_the_image_and_its_enlargements() -> None:
    image = picture() / 255
    total = image.copy()
    for factor in np.arange(1, 1.21, 0.02):
        side = int(np.ceil(224 / factor))
        top = (224 - side) // 2
        large = ndimage.zoom(image[top : top + side, top : top + side], (factor, factor, 1), order=1)
        cut = (len(large) - 224) // 2
        total += large[cut : cut + 224, cut : cut + 224]
    expected = (total / 12 * 255).astype(int)
    assert np.abs(Corruption("zoom_blur", 3)(image, 0) - expected).max() <= 1


def test_defocus_is_a_disk() -> None:
    """A point becomes the disk of radius 6, whose edge a Gaussian of 3 x 3 pixels smooths."""
    point = np.zeros((224, 224, 3))
    point[112, 112] = 1
    blurred = Corruption("defocus_blur", 3)(point * 255, 0)[..., 0] / 255  # 255-fold, since a share is below a level
    y, x = np.mgrid[-112:112, -112:112]
    inside, outside = x**2 + y**2 <= 25, x**2 + y**2 > 64
    assert (np.abs(blurred[inside] - 255 / 113) < 0.02).all() or blurred[inside].min() == 1
    assert (blurred[outside] == 0).all()


@pytest.mark.parametrize("side", [112, 224, 448])
def test_lengths_follow_the_side(side: int) -> None:
    """The spread of a blurred point, in shares of the side: r / 2 of a disk, 0.6 of half a Gaussian."""
    spreads = {}
    for kind, severity in (("defocus_blur", 4), ("motion_blur", 3)):
        image = np.zeros((side, side, 3))
        image[side // 2, side // 2] = 1
        scale = side / 224
        blurred = KINDS[kind].function(image, KINDS[kind].constants[severity - 1], np.random.default_rng(3), scale)
        weights = blurred[..., 0].sum(0)
        places = np.arange(side)
        middle = (weights * places).sum() / weights.sum()
        spreads[kind] = np.sqrt((weights * (places - middle) ** 2).sum() / weights.sum()) / side
        assert weights.sum() == pytest.approx(1, abs=0.02)  # the authors smooth the disk across mirrored borders
    assert spreads["defocus_blur"] == pytest.approx(4 / 224, rel=0.06)
    along = 8 * np.sqrt(1 - 2 / np.pi) * np.cos(np.radians(np.random.default_rng(3).uniform(-45, 45)))
    assert spreads["motion_blur"] == pytest.approx(along / 224, rel=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_images_of_any_side(kind: str) -> None:
    for shape in ((32, 32), (17, 40), (1, 1)):
        found = Corruption(kind, 5)(picture(*shape) / 255, 3)
        assert found.shape == (*shape, 3)
        assert found.dtype == np.uint8
    assert not np.array_equal(Corruption(kind, 5)(picture(32, 32) / 255, 3), picture(32, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_kind_and_severity_alone_determine_the_draw(kind: str) -> None:
    image = picture(64, 64) / 255
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [Corruption(kind, 3)(image, sample) for sample in (5, 6)]
    np.random.seed(9)
    torch.manual_seed(9)
    again = [Corruption(kind, 3)(image, sample) for sample in (6, 5)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(*first) == (kind in FIXED)
    np.random.set_state(("MT19937", states[0], 624))
    torch.set_rng_state(states[1])
    Corruption(kind, 3)(image, 5)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_kinds_severities_and_samples_have_draws_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[float] = []

    def note(image: NDArray[Any], constants: Any, draw: np.random.Generator, scale: float) -> NDArray[Any]:
        numbers.append(draw.random())
        return image

    noted = {name: kind._replace(function=note) for name, kind in KINDS.items()}
    monkeypatch.setattr("robustclip.data.corruptions.KINDS", noted)
    for name, severity, sample in itertools.product(noted, range(1, 6), range(3)):
        Corruption(name, severity)(np.zeros((2, 2, 3)), sample)
    assert len(set(numbers)) == len(numbers) == 15 * 5 * 3


def test_an_elastic_field_without_strength_changes_nothing() -> None:
    image = picture(64, 64) / 255
    moved = KINDS["elastic_transform"].function(image, [0, 0.01, 0], np.random.default_rng(0), 1.0)
    assert np.allclose(moved, image, atol=1e-9)


def test_a_known_affine_map_shifts_the_image() -> None:
    """All three corners move by the same step, so that the image does."""

    class Steps:
        def uniform(self, low: float, high: float, size: Any) -> NDArray[Any]:
            return np.full(size, high) if tuple(size) == (3, 2) else np.zeros(size)

    image = picture(64, 64) / 255
    moved = KINDS["elastic_transform"].function(image, [0, 0.01, 3 / 244], Steps(), 1.0)  # type: ignore[arg-type]
    assert np.allclose(moved[3:, 3:], image[:-3, :-3], atol=1e-9)


def test_filters_keep_a_constant_image() -> None:
    image = np.full((40, 40, 3), 0.3)
    kernel = np.ones((5, 5)) / 25
    assert np.allclose(convolved(image, kernel), 0.3)
    assert np.allclose(moved_along(image, 10, 3, 33.0, 0.5), 0.3)


def test_a_fractal_fills_the_unit_range_and_decays() -> None:
    smooth, rough = (fractal_heights(128, decay, np.random.default_rng(0)) for decay in (3.0, 1.4))
    assert (smooth.min(), smooth.max(), smooth.shape) == (0, 1, (128, 128))
    assert np.abs(np.diff(smooth, axis=0)).mean() < np.abs(np.diff(rough, axis=0)).mean() / 3


def test_photographs_of_frost_replace_the_drawn_texture(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), (0, 100, 200)).save(tmp_path / "frost1.png")
    image = np.zeros((224, 224, 3))
    found = Corruption("frost", 2, tmp_path)(image, 0)
    assert found.reshape(-1, 3).tolist() == [[0, 60, 120]] * 224**2
    drawn = Corruption("frost", 2)
    assert drawn.identity["constants"] != Corruption("frost", 2, tmp_path).identity["constants"]
    small = Corruption("frost", 2, tmp_path)(np.zeros((448, 448, 3)), 0)  # needs 448 / 2 pixels of the photograph
    assert small.shape == (448, 448, 3)


@pytest.mark.parametrize(("kind", "severity"), [("fog", 0), ("fog", 6), ("fog", -1), ("rain", 1)])
def test_kinds_and_severities_that_do_not_exist_are_refused(kind: str, severity: int) -> None:
    with pytest.raises(ValueError, match=rf"at a severity from 1 to 5, got '{kind}' at {severity}"):
        Corruption(kind, severity)


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"found none in {tmp_path}"):
        Corruption("frost", 2, tmp_path).identity["constants"]


def test_every_kind_and_severity_has_constants_of_its_own() -> None:
    assert len(KINDS) == 15
    identities = [Corruption(kind, severity).identity for kind in KINDS for severity in range(1, 6)]
    assert len({identity["constants"] for identity in identities if identity["kind"] == "fog"}) == 5
    assert [KINDS[kind].category for kind in KINDS] == ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
