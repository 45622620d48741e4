"""Losses that attacks maximise: one value per sample, in fp32, of logits ``(B, C)`` and labels ``(B,)``."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs and targets to a loss per sample ``(B,)``; the attack maximises its sum."""

LossName = Literal["ce", "margin", "dlr"]

SMALLEST_SPREAD = 1e-12  # added to a spread of logits; the denominator's constant in Croce & Hein's code
CLASSES_FOR_DLR, CLASSES_FOR_TARGETED_DLR = 3, 4


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy.

    Args:
        outputs: logits ``(B, C)``.
        targets: labels ``(B,)``.
    """
    return F.cross_entropy(outputs.float(), targets, reduction="none")


def margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """Computes ``max_{j != y} z_j - z_y``, positive for misclassified samples.

    This is the margin of Carlini & Wagner (https://arxiv.org/abs/1608.04644).

    Args:
        outputs: logits ``z`` ``(B, C)``.
        labels: ``y`` ``(B,)``.
    """
    logits = outputs.float()
    return without_label(logits, labels).max(1).values - _pick(logits, labels)


def dlr(outputs: Tensor, labels: Tensor) -> Tensor:
    """Computes the difference of logits ratio: the margin divided by ``z_(1) - z_(3)``.

    This is the DLR loss of Croce & Hein (https://arxiv.org/abs/2003.01690).

    Args:
        outputs: logits ``z`` ``(B, C)``.
        labels: ``(B,)``.

    Raises:
        ValueError: there are fewer than 3 classes.
    """
    _check_classes(outputs, CLASSES_FOR_DLR, "DLR")
    highest = outputs.float().topk(3).values
    return margin(outputs, labels) / (highest[:, 0] - highest[:, 2] + SMALLEST_SPREAD)


def targeted_margin(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Computes the targeted margin ``z_t - z_y``.

    Args:
        outputs: logits ``z`` ``(B, C)``.
        labels: ``y`` ``(B,)``.
        targets: target classes ``t`` ``(B,)``.
    """
    logits = outputs.float()
    return _pick(logits, targets) - _pick(logits, labels)


def targeted_dlr(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Computes ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``, the targeted DLR loss.

    The loss is of Croce & Hein (https://arxiv.org/abs/2003.01690).

    Args:
        outputs: logits ``z`` ``(B, C)``.
        labels: ``y`` ``(B,)``.
        targets: target classes ``t`` ``(B,)``.

    Raises:
        ValueError: there are fewer than 4 classes.
    """
    _check_classes(outputs, CLASSES_FOR_TARGETED_DLR, "targeted DLR")
    highest = outputs.float().topk(4).values
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return targeted_margin(outputs, labels, targets) / (spread + SMALLEST_SPREAD)


LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def select_loss(loss: LossName, classes: int, *, is_targeted: bool = False) -> tuple[LossName, str]:
    """Replaces DLR by the margin where there are too few classes for it.

    Args:
        loss: loss by name.
        classes: number of classes.
        is_targeted: whether the loss is that of a targeted attack.

    Returns:
        The loss, and a note that states the replacement, else empty.
    """
    needed = CLASSES_FOR_TARGETED_DLR if is_targeted else CLASSES_FOR_DLR
    if loss != "dlr" or classes >= needed:
        return loss, ""
    return "margin", f"{classes} classes: the margin instead of DLR"


def predicted(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the predicted classes ``(B,)``; where the label shares the largest logit with another class, the latter.

    So the order of the classes, which `argmax` follows, does not make a sample robust.

    Args:
        outputs: logits ``(B, C)``.
        labels: ``(B,)``.
    """
    highest = outputs.argmax(1)
    is_tied = (outputs == _pick(outputs, labels)[:, None]).sum(1) > 1
    return torch.where(is_tied & (highest == labels), without_label(outputs, labels).argmax(1), highest)


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Sets the label's logit to minus infinity.

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)``.
    """
    return logits.scatter(1, labels[:, None], -torch.inf)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _check_classes(outputs: Tensor, needed: int, name: str) -> None:
    if outputs.shape[1] < needed:
        raise ValueError(f"{name} needs at least {needed} classes, got {outputs.shape[1]}; use loss='margin'")
