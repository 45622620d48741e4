"""Zero-shot heads: what the text tower says of a task, ready to be compared with image features."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustclip.types import Task


def encode_heads(encode: Callable[[Task], Tensor], tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Heads by the names of their tasks: ``(C, D)``, or ``(C, G, D)`` for labels that are the best of G class names.

    Args:
        encode: gives the features ``(C, D)`` of a task's class names.
        tasks: those with the same words are encoded once.
    """
    by_words: dict[tuple[tuple[str, ...], ...], Tensor] = {}
    heads = {}
    for task in tasks:
        words = task.class_names, task.templates
        if words not in by_words:
            by_words[words] = encode(task).detach()
        found = by_words[words]
        heads[task.name] = found if task.groups is None else found[torch.tensor(_rows(task.groups))]
    return heads


def head_logits(features: Tensor, head: Tensor, scale: Tensor) -> Tensor:
    """Logits ``(B, C)`` of image features ``(B, D)``; of a grouped label, the highest of its members.

    Args:
        features: of the images.
        head: ``(C, D)`` or ``(C, G, D)``.
        scale: inverse temperature, a scalar.
    """
    logits = scale * features @ head.flatten(0, -2).T
    return logits if head.ndim == 2 else logits.view(-1, *head.shape[:2]).amax(-1)


def _rows(groups: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Groups of one length: shorter ones repeat their first member, which changes no maximum."""
    longest = max(map(len, groups))
    return [[*group, *[group[0]] * (longest - len(group))] for group in groups]
