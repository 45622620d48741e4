"""Folders and repositories in the layout of the Hugging Face library, as ``save_pretrained`` writes them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from robustclip.convert import hugging_face, open_clip_folder, siglip
from robustclip.convert.pixel_settings import read_pixels
from robustclip.models import hub, tensor_files
from robustclip.models.clip import CLIPModel
from robustclip.models.weight_origin import read_origin, write_origin
from robustclip.textfiles import read_text

CONFIG = "config.json"
# Modules that convert a kind of model, by the library's ``model_type``.
KINDS: dict[str, ModuleType] = {"clip": hugging_face, "siglip": siglip}
# Names of weights as safetensors and as pickles: one file, or parts that an index lists.
WEIGHTS = (("model.safetensors", "model-*-of-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*-of-*.bin"))
INDEX = ".index.json"


def convert(source: str, aside: Path) -> float:
    """Writes a Hugging Face model in open_clip's local-dir layout, and returns the largest difference of cosines.

    Args:
        source: folder, or repository of the Hub by its ``hf-hub:`` name.
        aside: folder to write to.

    Raises:
        ValueError: the source is of another kind or layout, cannot be read, or gives other logits when it is converted.
    """
    snapshot = hub.fetch(source) if hub.is_hub_name(source) else None
    folder = Path(source) if snapshot is None else snapshot.folder
    if (folder / open_clip_folder.CONFIG).is_file():
        raise ValueError(f"{source} can be used as it is: --model.pretrained {source}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{source} has no {CONFIG}; a folder must hold a Hugging Face CLIPModel or SiglipModel")
    kind, config, model = _read_config(folder, source)
    pixels = read_pixels(folder, model["vision_cfg"]["image_size"], is_needed=kind is siglip)
    kind.write_files(folder, config, aside)
    if snapshot is not None:
        hub.fetch_weights(snapshot, *WEIGHTS)
    origin = None if snapshot is None else {"repository": snapshot.repository, "commit": snapshot.commit}
    open_clip_folder.write_config(aside, model, pixels, origin)
    open_clip_folder.write_weights(aside / open_clip_folder.WEIGHTS, kind.to_open_clip(read_weights(folder)))
    if (facts := read_origin(folder)) is not None:  # a model of `robustclip export`, which may be robust
        write_origin(aside, facts)
    try:
        written = CLIPModel(pretrained=str(aside))
    except ValueError as error:  # its message names the folder that is being written
        reason = tensor_files.one_line(error.__cause__ or error)
        raise ValueError(f"the weights of {source} do not fit its {CONFIG}: {reason}") from error
    return open_clip_folder.check_parity(
        kind.library_similarities(folder, written), open_clip_folder.similarities(written)
    )


def _read_config(folder: Path, source: str) -> tuple[ModuleType, Any, dict[str, Any]]:
    """Reads the kind of a model, the library's configuration and the ``model_cfg`` made of it."""
    file = folder / CONFIG
    try:
        model_type = json.loads(read_text(file)).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} must hold a mapping in JSON: {tensor_files.one_line(error)}") from error
    if (kind := KINDS.get(model_type)) is None:
        raise ValueError(f"{source} holds a model of type {model_type!r}; only {' and '.join(KINDS)} are imported")
    library = hugging_face.library()
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's checks raise errors of many classes
        raise ValueError(f"{file} cannot be read: {tensor_files.one_line(error)}") from error
    try:
        return kind, config, kind.model_config(config)
    except (AttributeError, TypeError) as error:  # releases before 5 do not check the types of the values
        raise ValueError(f"{file} cannot be read: {tensor_files.one_line(error)}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a Hugging Face folder, by the library's names; safetensors before pickles.

    Raises:
        ValueError: the folder has no weights, lacks a part of them, or a file cannot be read safely.
    """
    for whole, parts in WEIGHTS:
        if (folder / whole).is_file():
            files = [folder / whole]
        elif (folder / f"{whole}{INDEX}").is_file():
            files = _indexed(folder / f"{whole}{INDEX}")
        else:
            files = sorted(folder.glob(parts))
        if files:
            states = [tensor_files.checked_state(tensor_files.read_file(file), str(file)) for file in files]
            return {name: tensor for state in states for name, tensor in state.items()}
    raise ValueError(f"{folder} has no {WEIGHTS[0][0]} and no {WEIGHTS[1][0]}")


def _indexed(index: Path) -> list[Path]:
    """Lists the files of weights that an index names."""
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must map tensors to files under weight_map: {error}") from error
    if strange := [name for name in names if Path(str(name)).name != name]:
        raise ValueError(f"{index} names {strange[0]!r}, which must be a file of its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index.parent} lacks {missing[0]!r}, a part of the weights; download it again")
    return [index.parent / name for name in names]
