"""The command ``robustclip export``, which converts a fine-tuned model to a folder for other programs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from robustclip.convert import hugging_face, open_clip_folder, siglip
from robustclip.convert.model_card import LIBRARIES, LIBRARY_CLASSES, model_card
from robustclip.convert.pixel_settings import write_pixels
from robustclip.methods import RobustMethod
from robustclip.models.clip import CLIPModel, fingerprint
from robustclip.models.layers import frozen
from robustclip.models.lora import merged_state
from robustclip.models.weight_origin import Origin, write_origin
from robustclip.persistence import atomic_folder
from robustclip.results.run import Run
from robustclip.types import Crop

DATA_MODULE = "CLIPDataModule"


def export(
    method: RobustMethod,
    out: Path,
    *,
    to: str = "open_clip",
    training: Mapping[str, Any] | None = None,
    results: Path | None = None,
) -> None:
    """Writes weights, configuration, tokenizer and a model card, and checks that they give the method's logits.

    Args:
        method: method with its trained weights.
        out: folder to write; it must not exist.
        to: ``open_clip`` for its local-dir layout, ``hf`` for a Hugging Face ``CLIPModel``, or for a ``SiglipModel`` if
            the base model was imported from one.
        training: settings of ``robustclip fit``, for the model card.
        results: folder of a finished test of this model, for the model card.

    Raises:
        ValueError: the method adds something to the towers at inference, the format does not support the architecture,
            the folder gives other logits, the results are of other weights, or ``out`` exists.
    """
    if to not in LIBRARIES:
        raise ValueError(f"to must be one of {', '.join(LIBRARIES)}, got {to!r}")
    run = None if results is None else Run.open(results)
    clip = method.eval().clip.float()
    if run is not None and run.result.get("model", {}).get("weights") != fingerprint(method):
        raise ValueError(f"{results} is a test of other weights, which the model card must not claim; test this model")
    _check_is_towers_alone(method)
    crop = _crop(training, run)
    with atomic_folder(out) as aside:
        difference = (_write_open_clip if to == "open_clip" else _write_hugging_face)(clip, aside, crop)
        card = model_card(method, to=to, crop=crop, training=training, run=run)
        (aside / open_clip_folder.README).write_text(card, encoding="utf-8")
        attack = None if method.attack is None or method.has_attacked is False else repr(method.attack)
        write_origin(aside, Origin(type(method).__name__, attack, clip.fingerprint, method.trained_on))
    sys.stdout.write(f"the logits are the method's (cosines within {difference:.0e})\n{out}\n")


def _check_is_towers_alone(method: RobustMethod) -> None:
    """Refuses a method that computes more than its two towers, which exported formats cannot represent."""
    clip = method.clip
    with torch.no_grad(), frozen(method):
        own = open_clip_folder.similarities(clip)
        for part, logits in (
            ("image", open_clip_folder.similarities(clip, image_features=method.image_features)),
            ("class", open_clip_folder.similarities(clip, class_features=method.class_features)),
        ):
            difference = float((logits.cosines - own.cosines).abs().max())
            if not difference <= open_clip_folder.TOLERANCE:  # nan is refused too
                raise ValueError(
                    f"{type(method).__name__} adds to the towers at inference (cosines of its {part} features differ by"
                    f" {difference:.1e}), as prompts, adapters and heads do; neither format supports this"
                )
    if added := [name for name in method.state_dict() if not name.startswith("clip.")]:
        raise ValueError(f"{type(method).__name__} has {added[0]!r} beside the towers; neither format supports it")


def _crop(training: Mapping[str, Any] | None, run: Run | None) -> Crop | None:
    """Returns the crop of the test, or else of the training; None if an own data module prepared the images."""
    config = (None if run is None else run.result.get("config")) or training
    data = dict((config or {}).get("data") or {})
    if not data or not str(data.get("class_path", DATA_MODULE)).endswith(DATA_MODULE):
        return None
    crop: Crop = (data.get("init_args") or data).get("crop", "tecoa")  # older settings lack the key, and had this crop
    return crop


def _write_open_clip(clip: CLIPModel, folder: Path, crop: Crop | None) -> float:
    open_clip_folder.write(clip, folder, crop)
    return open_clip_folder.check_folder(folder, clip)


def _write_hugging_face(clip: CLIPModel, folder: Path, crop: Crop | None) -> float:
    kind: ModuleType = siglip if clip.tower else hugging_face
    settings = kind.library_config(clip)
    settings.architectures = [LIBRARY_CLASSES[settings.model_type]]
    settings.save_pretrained(folder)
    open_clip_folder.write_weights(folder / "model.safetensors", kind.from_open_clip(merged_state(clip.net)))
    kind.write_tokenizer(clip, folder)
    write_pixels(clip, folder, crop)
    return open_clip_folder.check_parity(open_clip_folder.similarities(clip), kind.library_similarities(folder, clip))
