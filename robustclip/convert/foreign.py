"""Checkpoints of other projects, read as tensors without running code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustclip.models import tensor_files
from robustclip.models.tensor_files import checked_state, read_file

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


def read(path: Path) -> Weights:
    """Reads a file of TeCoA's, PMG-AFT's, FARE's or open_clip's format.

    Raises:
        ValueError: the file may contain code, is damaged, or contains no towers.
    """
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


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a Hugging Face folder, by the library's names.

    Raises:
        ValueError: the folder has no weights, or a file may contain code or is damaged.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # large models have several files
        if files := sorted(folder.glob(pattern)):
            return {name: tensor for file in files for name, tensor in _tensors(_load(file), file).items()}
    raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def check_fits(state: Mapping[str, Tensor], module: torch.nn.Module, of: str) -> None:
    """Checks that tensors have the names and sizes of those of the module that loads them.

    Args:
        state: tensors by name.
        module: image tower, or whole model.
        of: description of the module, for messages.

    Raises:
        ValueError: a tensor is missing, unknown, or of another size or kind.
    """
    needed = module.state_dict()
    missing, unknown = sorted(needed.keys() - state.keys()), sorted(state.keys() - needed.keys())
    if missing or unknown:
        problems = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise ValueError(
            f"the checkpoint does not fit {of}: it {' and '.join(problems)}; is arch the one it was made with?"
        )
    try:
        tensor_files.check_fits(state, needed, "the checkpoint")
    except ValueError as error:
        raise ValueError(f"the checkpoint does not fit {of}: {error}; is arch the one it was made with?") from error


def cosine_with(state: Mapping[str, Tensor], module: torch.nn.Module) -> float:
    """Computes the cosine between tensors and those of a module, over all matrices and filters as one vector.

    Norms and biases are left out, since they are similar in any two models.

    Args:
        state: tensors by name.
        module: module with tensors of the same names.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for name, own in module.state_dict().items():
        if own.ndim >= 2:
            a, b = state[name].float().flatten(), own.float().flatten()
            products += torch.stack([a @ b, a @ a, b @ b]).double()
    return float(products[0] / (products[1] * products[2]).sqrt())


def _load(path: Path) -> Mapping[str, Any]:
    """Reads a mapping from a file, without running code that it may contain."""
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping from names to tensors, got {type(content).__name__}")
    return content


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        others = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
        raise ValueError(f"{path} has an unknown format: it holds {_some(others)}, no state dict")
    return checked_state(content, str(path))


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that wrappers add to all names."""
    while wrapper := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(repr, names[:2])) + more
