"""``robustclip interpolate``: the models between the original and the fine-tuned one."""

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
from robustclip.persistence import atomic_folder

# What continues a training, which there is none of between two models.
OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "random_states", "pending_gradients", "bank")


def interpolate(method: RobustMethod, checkpoint: Path, out: Path, *, alphas: Sequence[float]) -> list[Path]:
    """Writes one checkpoint per alpha, ``(1 - alpha) original + alpha fine-tuned``, for ``--ckpt_path``.

    WiSE-FT (Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903), for every tensor that the checkpoint has.

    Args:
        method: with the original weights.
        checkpoint: of ``robustclip fit``.
        out: folder to write; it must not exist.
        alphas: in [0, 1]; 0 gives the original model, 1 the fine-tuned one.

    Returns:
        The files.

    Raises:
        ValueError: an alpha out of range or given twice, a checkpoint that does not belong to the method or learnt
            parameters that the original model does not have, or ``out`` exists.
    """
    check_alphas(alphas)
    content = read_checkpoint(checkpoint)
    method.on_load_checkpoint(content)
    original, tuned = {name: value.clone() for name, value in method.state_dict().items()}, content["state_dict"]
    _check_has_original(method, tuned)
    method.load_state_dict(original | tuned)
    weights = fingerprint(method)  # tests of models between the same two are one curve in a report
    method.load_state_dict(original)
    kept = {name: value for name, value in content.items() if name not in OF_TRAINING}
    names = [f"alpha-{alpha:g}.ckpt" for alpha in alphas]
    with atomic_folder(out) as aside:
        for alpha, name in zip(alphas, names, strict=True):
            origin = {"alpha": alpha, "fine_tuned": weights}
            changed = {"state_dict": between(original, tuned, alpha), "interpolation": origin}
            torch.save(with_digest(kept | changed), aside / name)
    files = [out / name for name in names]
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return files


def parse_alphas(text: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ValueError: what is none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"alphas must be numbers with commas between them, got {text!r}") from None


def between(original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) original + alpha tuned`` of every tensor of ``tuned``; counters are those of the nearer model."""
    return {
        name: torch.lerp(original[name].to(tensor), tensor, alpha)
        if tensor.is_floating_point()
        else (tensor if alpha >= 0.5 else original[name])
        for name, tensor in tuned.items()
    }


def check_alphas(alphas: Sequence[float]) -> None:
    """Refuses an empty list, repeated values and what is no mean.

    Raises:
        ValueError: as said.
    """
    if not alphas or len({f"{alpha:g}" for alpha in alphas}) < len(alphas):  # they name files
        raise ValueError(f"alphas must be given once each, got {list(alphas)}")
    for alpha in alphas:
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"alphas must be in [0, 1], got {alpha:g}; 0 is the original model, 1 the fine-tuned one")


def _check_has_original(method: RobustMethod, tuned: Mapping[str, Any]) -> None:
    if method.clip.pretrained is None:
        raise ValueError("model.pretrained is null: from random weights there is no original model to interpolate with")
    added = [name for name in tuned if not name.startswith(method.of_original)]
    if added:
        raise ValueError(
            f"{type(method).__name__} learnt {added[0]!r}, which the original model does not have;"
            " only weights of the towers are interpolated"
        )
