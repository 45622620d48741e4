"""Other projects' checkpoints, read as tensors and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustclip.models import tensor_files
from robustclip.models.tensor_files import checked_state, read_file

# What wrappers put before names: DataParallel and DistributedDataParallel, torch.compile, a module around the tower.
WRAPPERS = ("module.", "_orig_mod.", "model.")
AUTHORS_TOWER = "vision_encoder_state_dict"  # in files of TeCoA's code, and of PMG-AFT's, which grew from it
AUTHORS_PROMPTS = ("state_dict", "add_prompter")  # beside it: prompts on the image, and prompt tokens


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Args:
        state: tensors by open_clip's names.
        is_image_tower: names begin inside the image tower; else they are of the whole model.
        is_quick_gelu: activation that they were trained with; None where the file does not tell.
    """

    state: dict[str, Tensor]
    is_image_tower: bool
    is_quick_gelu: bool | None = None


def read(path: Path) -> Weights:
    """Reads a file of TeCoA's, PMG-AFT's, FARE's or open_clip's making.

    Raises:
        ValueError: it may hold code, is cut short, or holds something else than towers.
    """
    content = _load(path)
    if AUTHORS_TOWER in content:
        for name in AUTHORS_PROMPTS:
            prompts = content.get(name)
            if prompts and any(each.numel() for each in _tensors(prompts, path).values()):
                raise ValueError(
                    f"{path} holds visual prompts ({name}) beside the tower, without which it is another model;"
                    f" to import the bare tower, save {AUTHORS_TOWER} in a file of its own"
                )
        # Their code runs OpenAI's `clip` package, which computes QuickGELU throughout.
        return Weights(_unwrapped(_tensors(content[AUTHORS_TOWER], path)), is_image_tower=True, is_quick_gelu=True)
    if "add_prompter" in content:
        raise ValueError(f"{path} holds visual prompts alone, and no tower")
    if "base_model" in content:
        raise ValueError(f"{path} is a checkpoint of robustclip; use --ckpt_path, or `robustclip export`")
    state = _unwrapped(_tensors(content.get("state_dict", content), path))
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise ValueError(f"{path} has Hugging Face names; give its folder, whose config.json tells the architecture")
    towers = {name.startswith("visual.") for name in state}
    if towers == {True}:
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    return Weights(state, is_image_tower=len(towers) == 1)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of a Hugging Face folder, by their own names.

    Raises:
        ValueError: no weights, or as `read`.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # large models have several
        if files := sorted(folder.glob(pattern)):
            return {name: tensor for file in files for name, tensor in _tensors(_load(file), file).items()}
    raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def check_fits(state: Mapping[str, Tensor], module: torch.nn.Module, of: str) -> None:
    """Compares names and sizes with those of the module that is to take the tensors.

    Args:
        state: tensors by name.
        module: the image tower, or the whole model.
        of: what it is, for messages.

    Raises:
        ValueError: a missing or unknown tensor, or one of another size or kind.
    """
    needed = module.state_dict()
    missing, unknown = sorted(needed.keys() - state.keys()), sorted(state.keys() - needed.keys())
    if missing or unknown:
        told = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise ValueError(
            f"the checkpoint does not fit {of}: it {' and '.join(told)}; is arch the one it was made with?"
        )
    try:
        tensor_files.check_fits(state, needed, "the checkpoint")
    except ValueError as error:
        raise ValueError(f"the checkpoint does not fit {of}: {error}; is arch the one it was made with?") from error


def cosine_with(state: Mapping[str, Tensor], module: torch.nn.Module) -> float:
    """Cosine between tensors and those of a module with the same names, over all matrices and filters as one vector.

    Norms and biases are left out: those of any two models are alike.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for name, own in module.state_dict().items():
        if own.ndim >= 2:
            a, b = state[name].float().flatten(), own.float().flatten()
            products += torch.stack([a @ b, a @ a, b @ b]).double()
    return float(products[0] / (products[1] * products[2]).sqrt())


def _load(path: Path) -> Mapping[str, Any]:
    """A mapping from a file, without running anything that may be in it."""
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping from names to tensors, got {type(content).__name__}")
    return content


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and not all(isinstance(each, Tensor) for each in content.values()):
        others = sorted(str(name) for name, each in content.items() if not isinstance(each, Tensor))
        raise ValueError(f"{path} is no checkpoint that is known: it holds {_some(others)}, no state dict")
    return checked_state(content, str(path))


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them."""
    while wrapper := next((each for each in WRAPPERS if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(repr, names[:2])) + more
