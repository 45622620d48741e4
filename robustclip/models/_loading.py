"""Loading of base models: weights, configuration and tokenizer, refused in one line where they do not fit."""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor

from robustclip.models import hub, tensor_files
from robustclip.models.tensor_files import LOADING_ERRORS, one_line

# Texts whose tokens identify a tokenizer: cases, digits, punctuation, accents, another script, and a long text.
TOKENIZER_PROBE = ("a photo of a Cat.", "it's 3,141 km/h; [x] {y}_z", "café naïve Zürich", "猫 и собака", "word " * 99)
CONFIG = "open_clip_config.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pth")  # suffixes that open_clip searches for in a folder
HUB_WEIGHTS = ("open_clip_*.safetensors",), ("open_clip_*.bin",)  # names by open_clip, the safe ones first
LOCAL_TOWER, TOWER_CONFIG = "local-dir:", "config.json"  # timm's prefix of a folder, and the definition of its tower


class BaseModel(NamedTuple):
    """A base model and where it comes from.

    Args:
        net: open_clip model.
        tokenizer: its tokenizer.
        config: open_clip's ``model_cfg``.
        folder: folder with its files; None for tags, files and random weights.
        tower: timm's definition of an image tower that the folder has; empty for towers that timm has a name for.
        source: repository of the Hub and its commit; empty for weights of another origin.
    """

    net: Any
    tokenizer: Any
    config: dict[str, Any]
    folder: Path | None = None
    tower: Mapping[str, Any] = {}
    source: Mapping[str, str] = {}


def load(arch: str | None, source: str | None, image_size: int | None) -> BaseModel:
    """Loads model, tokenizer and configuration; weights that do not fit raise an error of one line.

    Args:
        arch: open_clip architecture; None for a folder or repository.
        source: open_clip tag, file, folder, or repository of the Hub; None for random weights.
        image_size: side of the tower's input in pixels; None for the model's own.

    Raises:
        ValueError: weights and architecture do not fit, or a file cannot be read safely.
    """
    is_hub_name = hub.is_hub_name(source)
    if source is not None and (is_hub_name or Path(source).is_dir()):
        if arch is not None:
            kind = "repository" if is_hub_name else "folder"
            raise ValueError(f"model arch must be null for the {kind} {source!r}, which has its own; got {arch!r}")
        return _load_repository(source, image_size) if is_hub_name else _load_folder(Path(source).resolve(), image_size)
    if arch is None:
        raise ValueError(f"model arch is missing: pretrained {source!r} is no folder; give an open_clip architecture")
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models())
        remedy = f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models()"
        raise ValueError(f"open_clip has no architecture {arch!r}; {remedy}")
    is_file = source is not None and Path(source).is_file()
    if source is not None and not is_file:
        _check_tag(arch, source)
    config = open_clip.get_model_config(arch)
    state = _read_weights(Path(str(source)), config) if is_file else {}
    try:
        # By default open_clip would download the own weights of a Hugging Face text tower.
        net = open_clip.create_model(arch, pretrained=source, force_image_size=image_size, pretrained_text=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"weights {source!r} do not load into {arch}: {one_line(error)}") from error
    _check_not_resampled(state, net, f"weights {source!r}", arch, image_size)
    return BaseModel(net, open_clip.get_tokenizer(arch), config)


def _load_repository(name: str, image_size: int | None) -> BaseModel:
    """Loads a repository of the Hub; its weights are downloaded after its configuration was read."""
    snapshot = hub.fetch(name)
    _check_layout(snapshot.folder, name)
    hub.fetch_weights(snapshot, *HUB_WEIGHTS)
    source = {"repository": snapshot.repository, "commit": snapshot.commit}
    return _load_folder(snapshot.folder, image_size)._replace(source=source)


def _check_layout(folder: Path, name: str) -> None:
    if (folder / CONFIG).is_file():
        return
    if (folder / "config.json").is_file():
        raise ValueError(
            f"pretrained {name} is in the layout of the Hugging Face library; convert it by"
            f" `robustclip import {name} --out DIR`, and give DIR"
        )
    raise ValueError(f"pretrained: model folder {name} has no {CONFIG}")


def _load_folder(folder: Path, image_size: int | None) -> BaseModel:
    _check_layout(folder, str(folder))
    if not any(file.suffix in WEIGHT_FILES for file in folder.iterdir()):
        raise ValueError(f"model folder {folder} has no weights (open_clip_model.safetensors)")
    config_file = folder / CONFIG
    config, source = _read_config(config_file)
    name, state = f"local-dir:{folder}", _read_weights(Path(str(_find_checkpoint_in_dir(folder))), config)
    _check_sizes(config, state, config_file)
    tower = _read_tower(config["vision_cfg"], folder)
    try:
        own: dict[str, Any] = {"text_cfg": _with_own_files(config["text_cfg"], folder)}
        if tower:
            own["vision_cfg"] = _with_own_tower(config["vision_cfg"], folder)
        net = open_clip.create_model(name, force_image_size=image_size, **own)
        tokenizer = open_clip.get_tokenizer(name, **own["text_cfg"]["tokenizer_kwargs"])
        tokenizer(list(TOKENIZER_PROBE))
    except ImportError as error:
        raise ValueError(f"model folder {folder} needs a package: {one_line(error)}") from error
    except LOADING_ERRORS as error:
        raise ValueError(f"model folder {folder} does not load: {one_line(error)}") from error
    _check_not_resampled(state, net, f"weights of {folder}", "its open_clip_config.json", image_size)
    return BaseModel(net, tokenizer, config, folder, tower, source)


def _read_tower(vision: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Reads timm's definition of an image tower of a folder; empty for a tower that timm has a name for."""
    name = str(vision.get("timm_model_name"))
    if not name.startswith(LOCAL_TOWER):
        return {}
    file = folder / name.removeprefix(LOCAL_TOWER) / TOWER_CONFIG
    tower = _section(_read_json(file), "the content", file)
    _section(tower.get("model_args"), "model_args", file)
    return tower


def _with_own_tower(vision: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns ``vision_cfg`` with the absolute path of the tower's definition, and without timm's own weights."""
    place = folder / str(vision["timm_model_name"]).removeprefix(LOCAL_TOWER)
    return {**vision, "timm_model_name": f"{LOCAL_TOWER}{place}", "timm_model_pretrained": False}


def _with_own_files(text_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns ``text_cfg`` with absolute paths to the folder's files; open_clip resolves them in the working folder."""
    tokenizer_options = dict(text_config.get("tokenizer_kwargs") or {})
    if "bpe_path" in tokenizer_options:
        tokenizer_options["bpe_path"] = str(folder / tokenizer_options["bpe_path"])
    if text_config.get("hf_tokenizer_name"):
        tokenizer_options["trust_remote_code"] = False  # else the library would ask whether to run code of the folder
    paths: dict[str, Any] = {"tokenizer_kwargs": tokenizer_options}
    if "hf_model_name" in text_config:
        paths |= {"hf_model_name": str(folder / text_config["hf_model_name"]), "hf_model_pretrained": False}
    return {**text_config, **paths}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON: {one_line(error)}") from error


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads ``model_cfg`` and the source of a folder, and checks the types of its sections."""
    content = _section(_read_json(file), "the content", file)
    config = _section(content.get("model_cfg"), "model_cfg", file)
    for key in ("vision_cfg", "text_cfg"):
        _section(config.get(key), f"model_cfg.{key}", file)
    pixels = _section(content.get("preprocess_cfg") or {}, "preprocess_cfg", file)
    for key in ("mean", "std"):
        values = pixels.get(key, [0.5] * 3)
        is_triple = isinstance(values, list) and len(values) == 3 and all(type(x) in (int, float) for x in values)
        if not is_triple or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            raise ValueError(f"preprocess_cfg.{key} of {file} must be three numbers, got {values!r:.80}")
    source = _section(content.get("source") or {}, "source", file)
    return config, {key: str(source[key]) for key in ("repository", "commit") if key in source}


def _section(value: Any, key: str, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} of {file} must be a mapping, got {value!r:.80}")
    return value


def _check_sizes(config: Mapping[str, Any], state: Mapping[str, Tensor], file: Path) -> None:
    """Refuses an architecture that the weights cannot fill, before memory is allocated for it."""
    largest = max((side for tensor in state.values() for side in tensor.shape), default=0)
    for key, value in flat("model_cfg", config).items():
        most = {"embed_dim": largest, "width": largest, "vocab_size": largest, "layers": len(state)}
        if (name := key.rpartition(".")[2]) not in most or not state:
            continue
        numbers = value if isinstance(value, list) and name == "layers" else [value]  # a ResNet has a list
        if not all(type(number) is int and 1 <= number <= most[name] for number in numbers):
            raise ValueError(f"{key} of {file} must be in [1, {most[name]}] for its weights, got {value!r:.80}")


def _read_weights(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the tensors of a weights file for open_clip, by open_clip's names."""
    if file.suffix in (".npz", ".npy"):  # big_vision's format, which open_clip converts
        return {}
    content = tensor_files.read_file(file)
    if isinstance(content, Mapping) and "base_model" in content:
        raise ValueError(f"{file} is a checkpoint of robustclip; use --ckpt_path, or `robustclip export`")
    is_wrapped = isinstance(content, Mapping) and "state_dict" in content
    state = tensor_files.checked_state(content["state_dict"] if is_wrapped else content, str(file))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "logit_bias" in state and config.get("init_logit_bias") is None:
        raise ValueError(
            f"{file} has a logit_bias, of the sigmoid loss, and the architecture has none;"
            " give the architecture that the weights were made with"
        )
    return state


def _check_not_resampled(
    state: Mapping[str, Tensor], net: Any, weights: str, arch: str, image_size: int | None
) -> None:
    """Refuses weights whose position embeddings open_clip has resized without a request, or of another number type."""
    own = net.state_dict()
    for name, tensor in state.items():
        mine = own.get(name, own.get(f"text.{name}"))
        if mine is not None and not tensor_files.is_of_kind(tensor, mine):
            raise ValueError(f"{name} of {weights} holds {tensor.dtype}, the model takes {mine.dtype}")
        if mine is None or mine.numel() == tensor.numel():
            continue
        if not name.startswith("visual."):
            raise ValueError(
                f"{weights} are for texts of {len(tensor)} tokens ({name}), {arch} has context_length {len(mine)};"
                " give the architecture that they were made with"
            )
        if image_size is None:
            side = net.visual.image_size
            side = side[0] if isinstance(side, tuple) else side
            raise ValueError(
                f"{weights} are for images of {len(tensor) - 1} patches ({name}), {arch} makes {len(mine) - 1};"
                f" give the architecture that they were made with, or --model.image_size {side} to resample them"
            )


def _check_tag(arch: str, tag: str) -> None:
    known = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in known:
        raise ValueError(f"pretrained {tag!r} is neither a file nor a folder nor a tag of {arch}; its tags: {known}")
    of_weights = get_pretrained_cfg(arch, tag).get("quick_gelu", False)
    of_arch = open_clip.get_model_config(arch).get("quick_gelu", False)
    if of_weights != of_arch:
        activation = {True: "QuickGELU", False: "GELU"}
        other = f"{arch}-quickgelu" if of_weights else arch.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {tag!r} were trained with {activation[of_weights]}, arch {arch} computes {activation[of_arch]};"
            f" use {other}"
        )


def flat(key: str, value: Any) -> dict[str, Any]:
    """Flattens nested mappings to values by dotted keys.

    Args:
        key: beginning of all keys.
        value: mapping, or a single value.
    """
    if not isinstance(value, Mapping):
        return {key: value}
    return {name: leaf for part, inner in value.items() for name, leaf in flat(f"{key}.{part}", inner).items()}
