"""``robustclip interpolate`` writes models between the original and the fine-tuned one."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustclip.methods import RobustMethod
from robustclip.methods._shared.saved_state import read_checkpoint, with_digest
from robustclip.models.clip import fingerprint
from robustclip.models.lora import is_factor
from robustclip.persistence import atomic_folder

# State that only a training run needs; an interpolated model has none.
TRAINING_STATE = (
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "callbacks",
    "random_states",
    "pending_gradients",
    "bank",
    "shift",
)


def interpolate(method: RobustMethod, checkpoint: Path, out: Path, *, alphas: Sequence[float]) -> list[Path]:
    """Writes one checkpoint per alpha, ``(1 - alpha) original + alpha fine-tuned``, for ``--ckpt_path``.

    WiSE-FT (Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903), applied to every tensor of the checkpoint.

    Args:
        method: the method with the original weights.
        checkpoint: file of ``robustclip fit``.
        out: folder to write; it must not exist.
        alphas: shares of the fine-tuned weights in [0, 1]; 0 gives the original model, 1 the fine-tuned one.

    Returns:
        Paths of the checkpoints, in the order of the alphas.

    Raises:
        ValueError: an alpha is out of range or repeated, the checkpoint does not belong to the method or holds
            parameters that the original model lacks, or ``out`` exists.
    """
    _check_alphas(alphas)
    content = read_checkpoint(checkpoint)
    method.on_load_checkpoint(content)
    original, tuned = {name: value.clone() for name, value in method.state_dict().items()}, content["state_dict"]
    check_has_original(method, tuned)
    # With LoRA, W + c (alpha B) A is the mean of the weights; the factors A of both models must be the same.
    original |= {name: value for name, value in tuned.items() if is_factor(name) and name.endswith(".A")}
    method.load_state_dict(original | tuned)
    weights = fingerprint(method)  # groups the tests of these models to one curve in a report
    method.load_state_dict(original)
    kept = {name: value for name, value in content.items() if name not in TRAINING_STATE}
    names = [f"alpha-{alpha:g}.ckpt" for alpha in alphas]
    with atomic_folder(out) as aside:
        for alpha, name in zip(alphas, names, strict=True):
            origin = {"alpha": alpha, "fine_tuned": weights}
            changed = {"state_dict": between(original, tuned, alpha), "interpolation": origin}
            torch.save(with_digest(kept | changed), aside / name)
    files = [out / name for name in names]
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return files


def parse_numbers(text: str, option: str) -> list[float]:
    """Parses numbers with commas between them.

    Args:
        text: numbers of the command line.
        option: name of the option, for the message.

    Raises:
        ValueError: the text is not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, as in 0,0.5,1; got {text!r}") from None


def between(original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Computes ``(1 - alpha) original + alpha tuned`` for every tensor of ``tuned``.

    Args:
        original: weights of the original model.
        tuned: weights of the fine-tuned model.
        alpha: share of the fine-tuned weights, in [0, 1].

    Returns:
        Tensors by name; integer counters are copied from the nearer model.
    """
    return {
        name: torch.lerp(original[name].to(tensor), tensor, alpha)
        if tensor.is_floating_point()
        else (tensor if alpha >= 0.5 else original[name])
        for name, tensor in tuned.items()
    }


def _check_alphas(alphas: Sequence[float]) -> None:
    """Refuses an empty list, repeated values, and values outside [0, 1]."""
    if not alphas or len({f"{alpha:g}" for alpha in alphas}) < len(alphas):  # alphas are part of the file names
        raise ValueError(f"alphas must be given once each, got {list(alphas)}")
    for alpha in alphas:
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"alphas must be in [0, 1], got {alpha:g}; 0 is the original model, 1 the fine-tuned one")


def check_has_original(method: RobustMethod, tuned: Mapping[str, Any]) -> None:
    """Refuses weights that the original model does not have.

    Args:
        method: method with the original weights.
        tuned: trained tensors by name.

    Raises:
        ValueError: the original weights are random, or lack a tensor.
    """
    if method.clip.pretrained is None:
        raise ValueError(
            "model.pretrained is null, so there is no original model to interpolate with; name the base model"
        )
    added = [name for name in tuned if not name.startswith(method.pretrained_prefixes)]
    if added:
        raise ValueError(
            f"{type(method).__name__} trained {added[0]!r}, which the original model does not have;"
            " only weights of the towers can be interpolated"
        )
