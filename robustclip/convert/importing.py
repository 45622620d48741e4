"""The command ``robustclip import``, which converts another project's checkpoint for ``--model.pretrained``."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from robustclip.convert import library_folder, open_clip_folder
from robustclip.models import hub, tensor_files
from robustclip.models.clip import CLIPModel
from robustclip.names import excerpt
from robustclip.persistence import atomic_folder

NEAR = 0.5  # cosine between the weights of a model and its base; unrelated weights have about 0
ACTIVATIONS = {True: "QuickGELU", False: "GELU"}
# Prefixes that wrappers add to names: DataParallel and DistributedDataParallel, torch.compile, an outer module.
WRAPPERS = ("module.", "_orig_mod.", "model.")
AUTHORS_TOWER = "vision_encoder_state_dict"  # key in files of TeCoA's code, and of PMG-AFT's, which is based on it
AUTHORS_PROMPTS = ("state_dict", "add_prompter")  # keys in the same files: prompts on the image, and prompt tokens


@dataclass(frozen=True)
class Weights:
    """Content of a checkpoint of another project.

    Args:
        state: tensors by open_clip's names.
        is_image_tower: whether names are relative to the image tower; else they are of the whole model.
        is_quick_gelu: whether the weights were trained with QuickGELU; None if the file does not define it.
    """

    state: dict[str, Tensor]
    is_image_tower: bool
    is_quick_gelu: bool | None = None


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    pretrained: str | None = None,
    activation: str | None = None,
) -> None:
    """Writes a folder in open_clip's local-dir layout, and checks that it gives the logits of the checkpoint.

    Files may be those of TeCoA's and PMG-AFT's authors (``.pth.tar``), visual state dicts as FARE's, and state dicts of
    open_clip (``.pt``, ``.safetensors``). Folders and repositories hold a CLIPModel or SiglipModel of the Hugging Face
    library. A repository, as in ``hf-hub:google/siglip-base-patch16-224``, is downloaded from the Hub.

    Args:
        source: file, folder, or repository as ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``.
        out: folder to write; it must not exist.
        arch: open_clip architecture of the checkpoint; None for folders and repositories, which define their own.
        pretrained: base model (tag, file or folder) for missing parts, such as the text tower.
        activation: ``quickgelu`` or ``gelu``, which the weights were trained with, if neither file nor base defines it.

    Raises:
        ValueError: the file cannot be read safely, the weights do not fit or were trained with another activation, the
            logits differ, or ``out`` exists.
    """
    with atomic_folder(out) as aside:
        if hub.is_hub_name(source) or source.is_dir():
            if arch or pretrained or activation:
                raise ValueError(f"{source} defines its own architecture; omit --arch, --pretrained, --activation")
            difference = library_folder.convert(str(source), aside)
        else:
            difference = _import_file(source, aside, arch, pretrained, activation)
    sys.stdout.write(f"the logits are the checkpoint's (cosines within {difference:.0e})\n{out}\n")


def _import_file(source: Path, aside: Path, arch: str | None, pretrained: str | None, activation: str | None) -> float:
    if not source.is_file():
        raise ValueError(f"{str(source)!r} is neither a file nor a folder")
    weights = _read(source)
    if weights.is_image_tower and pretrained is None:
        raise ValueError(
            f"{source} holds an image tower; name the base model that provides the text tower,"
            " as in --arch ViT-B-32-quickgelu --pretrained openai"
        )
    base = CLIPModel(arch, pretrained)
    _check_activation(weights, activation, base)
    whole = arch or str(pretrained)
    module, name = (base.net.visual, f"the image tower of {whole}") if weights.is_image_tower else (base.net, whole)
    scale = weights.state.get("logit_scale")
    if scale is not None and not weights.is_image_tower:  # a scalar or a vector of length 1, depending on the version
        weights.state["logit_scale"] = scale.reshape(base.net.logit_scale.shape)
    _check_fits(weights.state, module, name)
    if pretrained is not None:
        cosine = _cosine_with(weights.state, module)
        doubt = "; fine-tuned weights stay near their base, so --pretrained is hardly theirs" if cosine < NEAR else ""
        sys.stdout.write(f"cosine of the weights with those of --pretrained: {cosine:.3f}{doubt}\n")
    module.load_state_dict(weights.state)
    open_clip_folder.write(base, aside)
    return open_clip_folder.check_folder(aside, base)


def _check_activation(weights: Weights, asked: str | None, base: CLIPModel) -> None:
    """Refuses weights that would be computed with another activation than they were trained with.

    The same weights with QuickGELU and with GELU are two models, one of them useless. Neither names nor sizes show
    which was used in training (https://github.com/mlfoundations/open_clip/issues/771).
    """
    if asked not in (None, "quickgelu", "gelu"):
        raise ValueError(f"activation must be quickgelu or gelu, got {asked!r}")
    computed = bool(base.config.get("quick_gelu", False))
    stated = {weights.is_quick_gelu, None if asked is None else asked == "quickgelu"} - {None}
    name = base.arch or str(base.pretrained)
    twin = f"{name}-quickgelu" if not computed else name.removesuffix("-quickgelu")
    has_twin = twin != name and twin in open_clip.list_models()
    for trained in stated:
        if trained != computed:
            remedy = f"use --arch {twin}" if has_twin else f"use an architecture with {ACTIVATIONS[bool(trained)]}"
            raise ValueError(
                f"the weights were trained with {ACTIVATIONS[bool(trained)]}, {name} computes {ACTIVATIONS[computed]};"
                f" {remedy}"
            )
    is_known_from_base = (
        base.pretrained is not None and not Path(base.pretrained).is_file()
    )  # tags and folders were checked
    if not stated and not is_known_from_base and has_twin:
        raise ValueError(
            f"a state dict does not define its activation, and open_clip has both {name} ({ACTIVATIONS[computed]}) and"
            f" {twin}; give the activation of its training: --activation quickgelu or --activation gelu"
        )


def _read(path: Path) -> Weights:
    """Reads a file of TeCoA's, PMG-AFT's, FARE's or open_clip's format."""
    content = _load(path)
    if AUTHORS_TOWER in content:
        for name in AUTHORS_PROMPTS:
            prompts = content.get(name)
            if prompts and any(tensor.numel() for tensor in _tensors(prompts, path).values()):
                raise ValueError(
                    f"{path} holds visual prompts ({name}) beside the tower, which are part of the model;"
                    f" to import the tower alone, save {AUTHORS_TOWER} in a file of its own"
                )
        # Their code uses OpenAI's `clip` package, which always computes QuickGELU.
        return Weights(_unwrapped(_tensors(content[AUTHORS_TOWER], path)), is_image_tower=True, is_quick_gelu=True)
    if "add_prompter" in content:
        raise ValueError(f"{path} holds visual prompts alone, and no tower")
    if "base_model" in content:
        raise ValueError(f"{path} is a checkpoint of robustclip; use --ckpt_path, or `robustclip export`")
    state = _unwrapped(_tensors(content.get("state_dict", content), path))
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise ValueError(f"{path} has Hugging Face names; give its folder, whose config.json has the architecture")
    towers = {name.startswith("visual.") for name in state}
    if towers == {True}:
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    return Weights(state, is_image_tower=len(towers) == 1)


def _check_fits(state: Mapping[str, Tensor], module: torch.nn.Module, of: str) -> None:
    """Checks that tensors have the names and sizes of those of the module that loads them."""
    needed = module.state_dict()
    missing, unknown = sorted(needed.keys() - state.keys()), sorted(state.keys() - needed.keys())
    if missing or unknown:
        problems = [
            f"{word} {excerpt(names, 2)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names
        ]
        raise ValueError(
            f"the checkpoint does not fit {of}: it {' and '.join(problems)}; is arch the one it was made with?"
        )
    try:
        tensor_files.check_fits(state, needed, "the checkpoint")
    except ValueError as error:
        raise ValueError(f"the checkpoint does not fit {of}: {error}; is arch the one it was made with?") from error


def _cosine_with(state: Mapping[str, Tensor], module: torch.nn.Module) -> float:
    """Computes the cosine between tensors and those of a module, over all matrices and filters as one vector.

    Norms and biases are left out, since they are similar in any two models.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for name, own in module.state_dict().items():
        if own.ndim >= 2:
            a, b = state[name].float().flatten(), own.float().flatten()
            products += torch.stack([a @ b, a @ a, b @ b]).double()
    return float(products[0] / (products[1] * products[2]).sqrt())


def _load(path: Path) -> Mapping[str, Any]:
    """Reads a mapping from a file, without running code that it may contain."""
    content = tensor_files.read_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping from names to tensors, got {type(content).__name__}")
    return content


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        others = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
        raise ValueError(f"{path} has an unknown format: it holds {excerpt(others, 2)}, no state dict")
    return tensor_files.checked_state(content, str(path))


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that wrappers add to all names."""
    while wrapper := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state
