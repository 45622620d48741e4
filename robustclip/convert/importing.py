"""The command ``robustclip import``, which converts another project's checkpoint for ``--model.pretrained``."""

import json
import sys
from pathlib import Path
from typing import Any

import open_clip

from robustclip.convert import hugging_face, open_clip_folder
from robustclip.convert.foreign import Weights, check_fits, cosine_with, read, read_folder
from robustclip.models.clip import CLIPModel
from robustclip.persistence import atomic_folder
from robustclip.textfiles import read_text

NEAR = 0.5  # cosine between the weights of a model and its base; unrelated weights have about 0
ACTIVATIONS = {True: "QuickGELU", False: "GELU"}


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    pretrained: str | None = None,
    activation: str | None = None,
) -> None:
    """Writes a folder in open_clip's local-dir layout, and checks that it gives the logits of the checkpoint.

    Args:
        source: ``.pth.tar`` of TeCoA's or PMG-AFT's authors, visual state dict as FARE's, open_clip state dict (``.pt``
            or ``.safetensors``), or folder of a Hugging Face ``CLIPModel``.
        out: folder to write; it must not exist.
        arch: open_clip architecture of the checkpoint; None for Hugging Face folders, which define their own.
        pretrained: base model (tag, file or folder) for missing parts, such as the text tower.
        activation: ``quickgelu`` or ``gelu``, which the weights were trained with, if neither file nor base defines it.

    Raises:
        ValueError: the file cannot be read safely, the weights do not fit or were trained with another activation, the
            logits differ, or ``out`` exists.
    """
    with atomic_folder(out) as aside:
        if source.is_dir():
            if arch or pretrained or activation:
                raise ValueError(f"{source} defines its own architecture; omit --arch, --pretrained, --activation")
            difference = _import_folder(source, aside)
        else:
            difference = _import_file(source, aside, arch, pretrained, activation)
    sys.stdout.write(f"the logits are the checkpoint's (cosines within {difference:.0e})\n{out}\n")


def _import_file(source: Path, aside: Path, arch: str | None, pretrained: str | None, activation: str | None) -> float:
    if not source.is_file():
        raise ValueError(f"{str(source)!r} is neither a file nor a folder")
    weights = read(source)
    if weights.is_image_tower and pretrained is None:
        raise ValueError(
            f"{source} holds an image tower; name the base model that provides the text tower,"
            " as in --arch ViT-B-32-quickgelu --pretrained openai"
        )
    base = CLIPModel(arch, pretrained)
    _check_activation(weights, activation, arch, pretrained)
    whole = arch or str(pretrained)
    module, name = (base.net.visual, f"the image tower of {whole}") if weights.is_image_tower else (base.net, whole)
    scale = weights.state.get("logit_scale")
    if scale is not None and not weights.is_image_tower:  # a scalar or a vector of length 1, depending on the version
        weights.state["logit_scale"] = scale.reshape(base.net.logit_scale.shape)
    check_fits(weights.state, module, name)
    if pretrained is not None:
        cosine = cosine_with(weights.state, module)
        doubt = "; fine-tuned weights stay near their base, so --pretrained is hardly theirs" if cosine < NEAR else ""
        sys.stdout.write(f"cosine of the weights with those of --pretrained: {cosine:.3f}{doubt}\n")
    module.load_state_dict(weights.state)
    open_clip_folder.write(base, aside)
    written = CLIPModel(pretrained=str(aside))
    return open_clip_folder.check_parity(open_clip_folder.similarities(base), open_clip_folder.similarities(written))


def _import_folder(source: Path, aside: Path) -> float:
    if (source / open_clip_folder.CONFIG).is_file():
        raise ValueError(f"{source} can be used as it is: --model.pretrained {source}")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; a folder must hold a Hugging Face CLIPModel")
    try:
        library = hugging_face.library()
        config = library.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        model = hugging_face.model_config(config) if config.model_type == "clip" else None
    except (OSError, KeyError, TypeError) as error:  # a ValueError has a clear message already
        raise ValueError(f"{source}/config.json cannot be read: {str(error).splitlines()[0][:200]}") from error
    if model is None:
        raise ValueError(f"{source} holds a {config.model_type!r}; only model_type 'clip' is imported")
    state = hugging_face.to_open_clip(read_folder(source))
    open_clip_folder.write_config(aside, model, _pixels(source))
    open_clip_folder.write_weights(aside / open_clip_folder.WEIGHTS, state)
    written = CLIPModel(pretrained=str(aside))
    return open_clip_folder.check_parity(
        hugging_face.library_similarities(source, written), open_clip_folder.similarities(written)
    )


def _pixels(source: Path) -> dict[str, Any]:
    """Reads the image normalisation of a Hugging Face folder; without one, returns OpenAI's."""
    processor: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):  # of version 5 of the library, and before it
        if (source / name).is_file():
            content = json.loads(read_text(source / name))
            processor = content.get("image_processor", content)
    return {
        "mean": processor.get("image_mean", open_clip.OPENAI_DATASET_MEAN),
        "std": processor.get("image_std", open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _check_activation(weights: Weights, asked: str | None, arch: str | None, pretrained: str | None) -> None:
    """Refuses weights that would be computed with another activation than they were trained with.

    The same weights with QuickGELU and with GELU are two models, one of them useless. Neither names nor sizes show
    which was used in training (https://github.com/mlfoundations/open_clip/issues/771).
    """
    if asked not in (None, "quickgelu", "gelu"):
        raise ValueError(f"activation must be quickgelu or gelu, got {asked!r}")
    computed = bool(open_clip_folder.model_config(arch, pretrained).get("quick_gelu", False))
    stated = {weights.is_quick_gelu, None if asked is None else asked == "quickgelu"} - {None}
    name = arch or str(pretrained)
    twin = f"{name}-quickgelu" if not computed else name.removesuffix("-quickgelu")
    has_twin = twin != name and twin in open_clip.list_models()
    for trained in stated:
        if trained != computed:
            remedy = f"use --arch {twin}" if has_twin else f"use an architecture with {ACTIVATIONS[bool(trained)]}"
            raise ValueError(
                f"the weights were trained with {ACTIVATIONS[bool(trained)]}, {name} computes {ACTIVATIONS[computed]};"
                f" {remedy}"
            )
    is_known_from_base = pretrained is not None and not Path(pretrained).is_file()  # tags and folders were checked
    if not stated and not is_known_from_base and has_twin:
        raise ValueError(
            f"a state dict does not define its activation, and open_clip has both {name} ({ACTIVATIONS[computed]}) and"
            f" {twin}; give the activation of its training: --activation quickgelu or --activation gelu"
        )
