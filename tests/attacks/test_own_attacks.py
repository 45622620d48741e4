"""Mistakes in `perturb` of a user's attack end in one line that names it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from robustclip.attacks import Attack


def search(change: Any) -> Any:
    return lambda self, images, forward, targets, loss, *, index, seed: change(images)


MISTAKES: dict[str, tuple[Any, str]] = {
    "four arguments": (
        lambda self, images, forward, targets, loss: images,
        "Mine.perturb(images, forward, targets, loss)",
    ),
    "no function": (3, "Mine.perturb must be a function, got 3"),
    "no images": (search(lambda x: None), "Mine.perturb must return a tensor of shape (B, 3, H, W)"),
    "a pair": (search(lambda x: (x, x)), "got tuple"),
    "one image": (search(lambda x: x[0]), "here (2, 3, 4, 4), got Tensor of shape (3, 4, 4)"),
}


def probabilities(images: Tensor) -> Tensor:
    return images.mean((2, 3))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    function, part = MISTAKES[name]
    attack = type("Mine", (Attack,), {"perturb": function})()
    with pytest.raises(ValueError, match=re.escape(part)):
        attack(torch.rand(2, 3, 4, 4), probabilities, torch.zeros(2, dtype=torch.long))


def test_arguments_of_other_kinds_are_taken() -> None:
    attack = type("Mine", (Attack,), {"perturb": lambda self, x, forward, y, *rest, **options: 1 - x})()
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(attack(images, probabilities, torch.zeros(2, dtype=torch.long)), 1 - images)
