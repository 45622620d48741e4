"""Image preprocessing in the files of the Hugging Face library: read strictly, and written."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from robustclip.models.clip import CLIPModel
from robustclip.textfiles import read_text
from robustclip.types import RESIZES, Crop

FILES = ("processor_config.json", "preprocessor_config.json")  # of version 5 of the library, and before it
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_pixels(folder: Path, image_size: int, *, is_needed: bool) -> dict[str, Any]:
    """Reads the image preprocessing of a Hugging Face folder as open_clip's ``preprocess_cfg``.

    Args:
        folder: folder with ``preprocessor_config.json``.
        image_size: side in pixels of the images that the model takes.
        is_needed: whether a folder without that file is refused; else OpenAI's preprocessing is taken.

    Raises:
        ValueError: the file is missing, damaged, or asks for something that open_clip does not do.
    """
    file = next((folder / name for name in reversed(FILES) if (folder / name).is_file()), None)
    if file is None:
        if is_needed:
            raise ValueError(f"{folder} has no {FILES[-1]}, which defines how images are normalised")
        sys.stdout.write(f"{folder} has no {FILES[-1]}: images are normalised as OpenAI's models do\n")
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        return {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    try:
        content = json.loads(read_text(file))
        processor = content.get("image_processor", content)
        _check_steps(processor)
        interpolation = INTERPOLATIONS[processor.get("resample", 3)]
        mean, std = (_triple(processor, key) for key in ("image_mean", "image_std"))
        mode = _resize_mode(processor, image_size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"resample {error} is neither 2 nor 3" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is not understood: {reason}") from error
    return {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}


def write_pixels(clip: CLIPModel, folder: Path, crop: Crop | None) -> None:
    """Writes the image preprocessing of a Hugging Face folder.

    Args:
        clip: model.
        folder: folder to write to.
        crop: crop of the images in training and test; None for that of the base model, if it squashed them, else for
            CLIP's own.
    """
    size, own = clip.image_size, clip.net.visual.preprocess_cfg
    square = {"height": size, "width": size}
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    kind: dict[str, Any]
    if crop == "squash" or (crop is None and own["resize_mode"] == "squash"):
        kind = {"image_processor_type": "SiglipImageProcessor", "size": square}
        kind["resample"] = numbers[own["interpolation"] if crop is None else RESIZES[crop].interpolation]
    else:
        resize = RESIZES[crop or "clip"]
        kind = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": resize.short_side(size)}}
        kind |= {"crop_size": square, "resample": numbers[resize.interpolation]}
    pixels = {"image_mean": clip.mean.flatten().tolist(), "image_std": clip.std.flatten().tolist()}
    text = json.dumps({**kind, **pixels}, indent=2)
    (folder / FILES[-1]).write_text(text + "\n", encoding="utf-8")


def _check_steps(processor: Mapping[str, Any]) -> None:
    """Refuses a preprocessing that leaves out a step."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(key, True) is not True:
            raise ValueError(f"{key} must be true, got {processor[key]!r}")
    if not math.isclose(factor := processor.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor must be 1/255, got {factor!r}")


def _triple(processor: Mapping[str, Any], key: str) -> list[float]:
    values = processor.get(key)
    if not isinstance(values, list) or len(values) != 3 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{key} must be three numbers, got {values!r:.80}")
    return values


def _resize_mode(processor: Mapping[str, Any], image_size: int) -> str:
    """Returns open_clip's name of the resize: to a square at once, or of the short side before a centre crop."""
    size = processor.get("size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = processor.get("crop_size")
    if not processor.get("do_center_crop", crop is not None):  # processors that have a crop do it by default
        crop = None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    square = {"height": image_size, "width": image_size}
    sizes = {name: value for name, value in size.items() if value is not None} if isinstance(size, Mapping) else {}
    if sizes == square and crop in (None, square):
        sys.stdout.write(
            f"this checkpoint's images were squashed to {image_size}x{image_size}; set data.crop to squash\n"
        )
        return "squash"
    if sizes.keys() != {"shortest_edge"} or crop is None or {key: crop.get(key) for key in square} != square:
        raise ValueError(
            f"size {size!r} and crop_size {crop!r} must give {image_size}x{image_size} pixels, as the model takes"
        )
    if (side := sizes["shortest_edge"]) != image_size:
        sys.stdout.write(
            f"this checkpoint's images had a short side of {side} before the crop, which open_clip's configuration"
            " cannot state; choose data.crop to match\n"
        )
    return "shortest"
