"""What attacks maximise: one value per sample, in fp32, of logits ``(B, C)`` and labels ``(B,)``."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to one loss per sample ``(B,)``; the attack maximises its sum."""

LossName = Literal["ce", "margin", "dlr"]

SMALLEST_SPREAD = 1e-12  # of logits; the denominator's constant in Croce & Hein's code
CLASSES_FOR_DLR, CLASSES_FOR_TARGETED_DLR = 3, 4


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per sample in fp32: logits ``(B, C)`` and labels ``(B,)`` to ``(B,)``."""
    return F.cross_entropy(outputs.float(), targets, reduction="none")


def margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, positive where misclassified (Carlini & Wagner, https://arxiv.org/abs/1608.04644)."""
    logits = outputs.float()
    return without_label(logits, labels).max(1).values - _pick(logits, labels)


def dlr(outputs: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over ``z_(1) - z_(3)`` (Croce & Hein, https://arxiv.org/abs/2003.01690).

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes(outputs, CLASSES_FOR_DLR, "DLR")
    highest = outputs.float().topk(3).values
    return margin(outputs, labels) / (highest[:, 0] - highest[:, 2] + SMALLEST_SPREAD)


def targeted_margin(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``z_t - z_y`` for target classes ``t`` ``(B,)``."""
    logits = outputs.float()
    return _pick(logits, targets) - _pick(logits, labels)


def targeted_dlr(outputs: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`` (Croce & Hein, https://arxiv.org/abs/2003.01690).

    Raises:
        ValueError: fewer than 4 classes.
    """
    _check_classes(outputs, CLASSES_FOR_TARGETED_DLR, "targeted DLR")
    highest = outputs.float().topk(4).values
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return targeted_margin(outputs, labels, targets) / (spread + SMALLEST_SPREAD)


LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def affordable(loss: LossName, classes: int, *, is_targeted: bool = False) -> tuple[LossName, str]:
    """The loss, or the margin where DLR has too few classes to compare, with a note that says so."""
    needed = CLASSES_FOR_TARGETED_DLR if is_targeted else CLASSES_FOR_DLR
    if loss != "dlr" or classes >= needed:
        return loss, ""
    return "margin", f"{classes} classes: the margin instead of DLR"


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits ``(B, C)`` with the label's at minus infinity."""
    return logits.scatter(1, labels[:, None], -torch.inf)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _check_classes(outputs: Tensor, needed: int, name: str) -> None:
    if outputs.shape[1] < needed:
        raise ValueError(f"{name} needs at least {needed} classes, got {outputs.shape[1]}; use loss='margin'")
