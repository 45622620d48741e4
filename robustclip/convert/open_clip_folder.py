"""Folders in open_clip's "local-dir" layout, and the check that a written model gives the same logits."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from robustclip.models import tensor_files
from robustclip.models.clip import CLIPModel
from robustclip.models.layers import frozen
from robustclip.models.lora import merged_state
from robustclip.types import RESIZES, Crop, Task

TOWER = "config.json"  # timm's definition of an image tower that it has no name for
CONFIG, WEIGHTS, README = "open_clip_config.json", "open_clip_model.safetensors", "README.md"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Tolerance of cosines in float32: another order of summation changes them by 1e-7, another activation by 1e-3 or more.
TOLERANCE = 1e-5
PROBE_IMAGES = 4
PROBE = Task("probe", ("cat", "red circle", "an aeroplane in the sky"), ("a photo of a {}", "{}"))


class Logits(NamedTuple):
    """Zero-shot logits as two factors, so that one tolerance suits every temperature.

    Args:
        cosines: ``(B, C)``.
        scale: scale of the logits.
        bias: constant that a model of the sigmoid loss adds to each logit.
    """

    cosines: Tensor
    scale: float
    bias: float = 0.0


def config_of(clip: CLIPModel) -> dict[str, Any]:
    """Returns a copy of a model's ``model_cfg``, with the image size that it has now."""
    config = deepcopy(clip.config)
    config["vision_cfg"]["image_size"] = clip.image_size
    return config


def write(clip: CLIPModel, folder: Path, crop: Crop | None = None) -> None:
    """Writes weights, configuration and tokenizer, which `CLIPModel` and open_clip's ``local-dir:`` load.

    Args:
        clip: model to write.
        folder: folder to write to.
        crop: crop of the images in training and test; None keeps the base model's preprocessing. The configuration
            states its interpolation, but has no place for the short side of ``tecoa``.
    """
    config = config_of(clip)
    base = clip.folder
    if base is not None:
        for file in base.iterdir():
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.name not in (CONFIG, README):
                shutil.copyfile(file, folder / file.name)
    elif isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(folder)
    if base is None and "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_name"] = "."
        clip.net.text.config.save_pretrained(folder)
    preprocessing = clip.net.visual.preprocess_cfg
    kept = {name: preprocessing[name] for name in ("interpolation", "resize_mode")}
    if crop is not None:
        resize = RESIZES[crop]
        kept = {"interpolation": resize.interpolation, "resize_mode": "squash" if resize.is_squashed else "shortest"}
    # The pixel statistics are those of the model, which a method may have changed.
    kept |= {name: tensor.flatten().tolist() for name, tensor in (("mean", clip.mean), ("std", clip.std))}
    if clip.tower:
        _write_tower(clip, folder)
    write_config(folder, config, kept)
    write_weights(folder / WEIGHTS, merged_state(clip.net))


def _write_tower(clip: CLIPModel, folder: Path) -> None:
    """Writes timm's definition of an image tower with the image size that the model has now."""
    tower, size = deepcopy(dict(clip.tower)), clip.image_size
    tower["model_args"]["img_size"] = size
    tower["pretrained_cfg"] = {**tower.get("pretrained_cfg", {}), "input_size": [3, size, size]}
    (folder / TOWER).write_text(json.dumps(tower, indent=2) + "\n", encoding="utf-8")


def write_config(
    folder: Path, model: dict[str, Any], preprocessing: dict[str, Any], source: dict[str, str] | None = None
) -> None:
    """Writes the configuration file ``open_clip_config.json``.

    Args:
        folder: folder to write to.
        model: ``model_cfg``.
        preprocessing: ``preprocess_cfg``.
        source: repository of the Hub and its commit; None for weights of another origin.
    """
    content = {"model_cfg": model, "preprocess_cfg": preprocessing} | ({"source": source} if source else {})
    text = json.dumps(content, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes tensors, of any device and memory layout, as safetensors with their digest.

    Args:
        path: file to write.
        state: tensors by name.
    """
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(
        plain, path, metadata={"format": "pt", tensor_files.DIGEST: tensor_files.digest(dict(sorted(plain.items())))}
    )


def probe_images(size: int) -> Tensor:
    """Draws random images ``(B, 3, size, size)`` in [0, 1], always the same."""
    return torch.rand(PROBE_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def similarities(
    clip: CLIPModel,
    image_features: Callable[[Tensor], Tensor] | None = None,
    class_features: Callable[[Task], Tensor] | None = None,
) -> Logits:
    """Computes a model's logits for the probe's images and classes.

    Args:
        clip: model.
        image_features: function of images that replaces the image tower.
        class_features: function of a task that replaces the text tower.
    """
    with torch.no_grad(), frozen(clip):
        images = (image_features or clip.encode_image)(probe_images(clip.image_size))
        cosines = images @ (class_features or clip.encode_classes)(PROBE).T
        bias = getattr(clip.net, "logit_bias", None)
        return Logits(cosines, float(clip.logit_scale), 0.0 if bias is None else float(bias.detach()))


def check_folder(folder: Path, clip: CLIPModel) -> float:
    """Loads a written folder again, and checks that it has the logits of a model as `check_parity` does.

    Args:
        folder: folder in the "local-dir" layout.
        clip: model that was written.
    """
    return check_parity(similarities(clip), similarities(CLIPModel(pretrained=str(folder))))


def check_parity(expected: Logits, actual: Logits) -> float:
    """Checks that two models have the same logits, and returns the largest difference of their cosines.

    Args:
        expected: logits of the original model.
        actual: logits of the model that was written and loaded again.

    Raises:
        ValueError: the difference exceeds `TOLERANCE`, or logit scales or biases differ by more than that, relatively.
    """
    difference = float((expected.cosines - actual.cosines).abs().max())
    scale = abs(actual.scale / expected.scale - 1)
    bias = abs(actual.bias - expected.bias) / max(1.0, abs(expected.bias))
    if not (difference <= TOLERANCE and scale <= TOLERANCE and bias <= TOLERANCE):  # nan is refused too
        raise ValueError(
            f"the written model gives other logits (cosines differ by {difference:.1e}, logit scales by {scale:.1e},"
            f" biases by {bias:.1e};"
            f" {TOLERANCE:.0e} is allowed), so it was not kept; is its architecture the one of the weights?"
        )
    return difference
