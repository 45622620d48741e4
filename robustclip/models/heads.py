"""Zero-shot classifier weights ("heads"), computed once per task by the text tower, and their logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustclip.types import Task


def encode_heads(encode: Callable[[Task], Tensor], tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Encodes the classes of every task as zero-shot classifier weights.

    Args:
        encode: function that returns the features ``(C, D)`` of a task's class names.
        tasks: tasks to encode; those with the same class names and prompts are encoded once.

    Returns:
        Weights by task name: ``(C, D)``, or ``(C, G, D)`` if each label is a group of up to G class names.
    """
    by_texts: dict[tuple[object, ...], Tensor] = {}
    heads = {}
    for task in tasks:
        texts = task.class_names, task.templates, task.descriptions
        if texts not in by_texts:
            by_texts[texts] = encode(task).detach()
        features = by_texts[texts]
        heads[task.name] = features if task.groups is None else features[torch.tensor(_rows(task.groups))]
    return heads


def head_logits(features: Tensor, head: Tensor, scale: Tensor) -> Tensor:
    """Computes the logits ``(B, C)`` of image features; a grouped label has the highest logit of its members.

    Args:
        features: ``(B, D)``, of the images.
        head: classifier weights ``(C, D)`` or ``(C, G, D)``.
        scale: inverse temperature, a scalar.
    """
    logits = scale * features @ head.flatten(0, -2).T
    return logits if head.ndim == 2 else logits.view(-1, *head.shape[:2]).amax(-1)


def _rows(groups: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Pads groups to one length by repeating their first member, which does not change their maximum."""
    longest = max(map(len, groups))
    return [[*group, *[group[0]] * (longest - len(group))] for group in groups]
