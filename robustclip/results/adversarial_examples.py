"""Adversarial examples: attacked images that a test stores, one file per sample."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from robustclip.persistence import atomic_write

NAME = re.compile(r"[a-z0-9_]+")  # names of tasks and attacks that keep a path inside its folder
NORMS = ("linf", "l2", "l1")
SUFFIX = ".safetensors"


class Example(NamedTuple):
    """A clean image and the attacked image of the same sample.

    Attributes:
        clean: ``(3, H, W)`` float32 in [0, 1].
        attacked: ``(3, H, W)`` float32 inside perturbation set and valid pixel range, unless the attack is wrong.
        task: name of the task.
        attack: name of the attack.
        number: sample id within the data set.
        label: class number.
        clean_prediction: class predicted for the clean image.
        prediction: class predicted for the attacked image.
        by: member of the attack that succeeded; ``clean``: misclassified without attack.
        eps: radius in [0, 1] pixel units; inf for an attack without radius.
        norm: ``linf``, ``l2`` or ``l1``.
    """

    clean: Tensor
    attacked: Tensor
    task: str
    attack: str
    number: int
    label: int
    clean_prediction: int
    prediction: int
    by: str
    eps: float
    norm: str


def save(example: Example, folder: Path) -> Path:
    """Writes an example to ``folder/<task>/<attack>/<id>.safetensors``, completely or not at all.

    Args:
        example: on any device; images of another precision are stored as float32.
        folder: folder of all examples; it is created if absent.

    Returns:
        Path of the file.

    Raises:
        ValueError: a malformed name, a negative number, or images that are not ``(3, H, W)``.
    """
    _check(example, f"example {example.number} of {example.task} under {example.attack}")
    path = folder / example.task / example.attack / f"{example.number}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"clean": example.clean, "attacked": example.attacked}
    # The format refuses tensors that share memory, as an image that no attack changed may.
    images = {name: image.detach().float().cpu().contiguous().clone() for name, image in tensors.items()}
    numbers = {name: str(getattr(example, name)) for name in ("label", "clean_prediction", "prediction", "by", "norm")}
    names = {"task": example.task, "attack": example.attack, "id": str(example.number), "eps": repr(float(example.eps))}
    atomic_write(path, _in_order(serialise(images, metadata=names | numbers)))
    return path


def load(path: Path) -> Example:
    """Reads an example.

    Pixels are not checked, so that the reader can find wrong ones, such as nan.

    Args:
        path: ``.../<task>/<attack>/<id>.safetensors``.

    Raises:
        ValueError: no such file, another format, or a path that differs from the file's own task, attack and id.
    """
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != {"clean", "attacked"}:
                raise ValueError(f"expected the tensors clean and attacked, found {sorted(file.keys())}")
            text = file.metadata() or {}
            clean, attacked = file.get_tensor("clean"), file.get_tensor("attacked")
        if not clean.dtype == attacked.dtype == torch.float32:
            raise ValueError(f"expected float32 images, found {clean.dtype} and {attacked.dtype}")
        example = _example(clean, attacked, text)
    except KeyError as error:
        raise ValueError(f"{path} is no example of `robustclip test`: it lacks {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no example of `robustclip test`: {error}") from error
    _check(example, str(path))
    place = (example.task, example.attack, f"{example.number}{SUFFIX}")
    if path.absolute().parts[-3:] != place:
        raise ValueError(f"{path} holds the example {'/'.join(place)}; move it there, or test again")
    return example


def load_all(folder: Path) -> Iterator[Example]:
    """Yields the examples of a run one by one, in the order of task, attack and id.

    Args:
        folder: folder ``examples`` of the run; an absent folder yields nothing.

    Raises:
        ValueError: a file that `load` refuses, or a link to a file outside the folder.
    """
    paths = [path for path in folder.glob(f"*/*/*{SUFFIX}") if not path.name.startswith(".")]
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}, to {path.resolve()}; examples must lie in their folder")
        if not path.stem.isdecimal():
            raise ValueError(f"{path} is no example of `robustclip test`: expected a name such as 12{SUFFIX}")
    for path in sorted(paths, key=lambda path: (path.parts[-3], path.parts[-2], int(path.stem))):
        yield load(path)


def _in_order(content: bytes) -> bytes:
    """Sorts the keys in the header of a safetensors file, since their order is random."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return content[:8] + header.encode().ljust(size) + content[8 + size :]


def _example(clean: Tensor, attacked: Tensor, text: dict[str, str]) -> Example:
    return Example(
        clean=clean,
        attacked=attacked,
        task=text["task"],
        attack=text["attack"],
        number=int(text["id"]),
        label=int(text["label"]),
        clean_prediction=int(text["clean_prediction"]),
        prediction=int(text["prediction"]),
        by=text["by"],
        eps=float(text["eps"]),
        norm=text["norm"],
    )


def _check(example: Example, subject: str) -> None:
    for name in (example.task, example.attack):
        if not NAME.fullmatch(name):
            raise ValueError(f"{subject}: a task or attack is named [a-z0-9_]+, got {name!r}")
    for name in ("number", "label", "clean_prediction", "prediction"):
        if getattr(example, name) < 0:
            raise ValueError(f"{subject}: {name} must be at least 0, got {getattr(example, name)}")
    shape = example.clean.shape
    if len(shape) != 3 or shape[0] != 3 or 0 in shape or example.attacked.shape != shape:
        shapes = f"{tuple(shape)} and {tuple(example.attacked.shape)}"
        raise ValueError(f"{subject}: expected a clean and an attacked image of one shape (3, H, W), found {shapes}")
    if example.norm not in NORMS or math.isnan(example.eps) or example.eps < 0:
        raise ValueError(
            f"{subject}: expected norm linf, l2 or l1 and eps >= 0, found {example.norm} and {example.eps}"
        )
