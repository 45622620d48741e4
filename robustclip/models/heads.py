"""Zero-shot classifier weights ("heads"), computed once per task by the text tower, and their logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from robustclip.types import Task


def encode_heads(encode: Callable[[Task], Tensor], tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Encodes the classes of every task as constant zero-shot classifier weights.

    Args:
        encode: function that returns the features ``(C, D)`` of a task's class names.
        tasks: tasks to encode; those with the same class names and prompts are encoded once.

    Returns:
        Weights by task name: ``(C, D)``, or ``(C, G, D)`` if each label is a group of up to G class names.

    Raises:
        ValueError: the features have another shape.
    """
    by_texts: dict[tuple[object, ...], Tensor] = {}
    heads = {}
    for task in tasks:
        texts = task.class_names, task.templates, task.descriptions
        if texts not in by_texts:
            by_texts[texts] = _checked(encode(task), task).detach()
        heads[task.name] = _grouped(by_texts[texts], task)
    return heads


def encode_head(encode: Callable[[Task], Tensor], task: Task) -> Tensor:
    """Encodes the classes of one task as classifier weights ``(C, D)`` or ``(C, G, D)``, with gradients.

    Args:
        encode: function that returns the features ``(C, D)`` of a task's class names.
        task: task to encode.

    Raises:
        ValueError: the features have another shape.
    """
    return _grouped(_checked(encode(task), task), task)


def has_gradient(encode: Callable[[Task], Tensor], task: Task) -> bool:
    """Checks whether the features of a task's classes have a gradient, by encoding them with one template.

    Args:
        encode: function that returns the features ``(C, D)`` of a task's class names.
        task: task to encode.
    """
    # The graph is not used, so that it need not keep any activation.
    with torch.enable_grad(), saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0)):
        return encode(replace(task, templates=task.templates[:1])).requires_grad


def head_logits(features: Tensor, head: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Computes the logits ``(B, C)`` of image features; a grouped label has the highest logit of its members.

    The precision is at least fp32, also under autocast: in bf16, logits between 16 and 32 have steps of 0.125.

    Args:
        features: ``(B, D)``, of the images.
        head: classifier weights ``(C, D)`` or ``(C, G, D)``.
        scale: inverse temperature, a scalar.

    Raises:
        ValueError: the features of the images have another shape.
    """
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or shape[1] != head.shape[-1]:
        raise ValueError(f"image_features must return features of shape (B, {head.shape[-1]}), got {shape}")
    with torch.autocast(features.device.type, enabled=False):
        precision = torch.promote_types(features.dtype, torch.float32)
        logits = scale * features.to(precision) @ head.to(precision).flatten(0, -2).T
    return logits if head.ndim == 2 else logits.view(-1, *head.shape[:2]).amax(-1)


def _checked(features: Tensor, task: Task) -> Tensor:
    """Returns the features of a task's classes if there is one row for each."""
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or shape[0] != len(task.class_names):
        raise ValueError(f"class_features must return features of shape ({len(task.class_names)}, D), got {shape}")
    return features


def _grouped(features: Tensor, task: Task) -> Tensor:
    """Arranges features ``(C, D)`` of class names by the labels of a task that has groups."""
    return features if task.groups is None else features[torch.tensor(_rows(task.groups))]


def _rows(groups: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Pads groups to one length by repeating their first member, which does not change their maximum."""
    longest = max(map(len, groups))
    return [[*group, *[group[0]] * (longest - len(group))] for group in groups]
