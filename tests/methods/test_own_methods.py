"""Mistakes in the functions of a user's method end in one line that names the function, before training starts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_trainer

from robustclip import CLIPDataModule
from robustclip.methods import CleanFineTuning, RobustMethod

# Function that replaces one of a method, and the parts of the message.
MISTAKES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "two arguments": ("training_loss", lambda self, images, labels: {}, ("(images, labels)", "(batch: ", "labels")),
    "no argument": ("training_loss", lambda self: {}, ("training_loss()", "(batch: ")),
    "no function": ("training_loss", 3, ("training_loss must be a function, got 3",)),
    "a tensor": ("training_loss", lambda self, batch: torch.zeros(()), ("training_loss must return a dict",)),
    "a rate": ("parameter_groups", lambda self, lr: [], ("parameter_groups(lr) must take ()",)),
    "parameters": ("parameter_groups", lambda self: list(self.clip.parameters()), ("list of dicts", "got Parameter")),
    "misspelt group": ("parameter_groups", lambda self: [{"param": []}], ("list of dicts", "got dict of ['param']")),
    "no task": ("class_features", lambda self: None, ("class_features() must take (task: ",)),
    "rows for other classes": ("class_features", lambda self, task: torch.zeros(5, 16), ("(144, D), got (5, 16)",)),
    "logits without task": ("logits", lambda self, images: images, ("logits(images) must take", "task")),
    "images": ("image_features", lambda self, images: images, ("image_features", "(B, 16), got (2, 3, 32, 32)")),
    "nothing": ("image_features", lambda self, images: None, ("image_features must return", "got ()")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, tiny_model: Path) -> None:
    function, value, parts = MISTAKES[name]
    method = type("Mine", (CleanFineTuning,), {function: value})(pretrained=str(tiny_model))
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        _fit(method)
    for part in parts[1:]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("function", "wrapper"),
    [
        ("training_loss", lambda inner: lambda self, data: inner(self, data)),
        ("logits", lambda inner: lambda self, x, task="train": inner(self, x, task)),
        ("logits", lambda inner: lambda self, *args, **kwargs: inner(self, *args, **kwargs)),
        ("class_features", lambda inner: lambda self, classes, *, scale=1: inner(self, classes)),
        ("head", lambda inner: lambda self, task: inner(self, task)),
    ],
)
def test_other_names_and_further_defaults_are_taken(
    function: str, wrapper: Callable[[Any], Any], tiny_model: Path
) -> None:
    value = wrapper(getattr(CleanFineTuning, function))
    _fit(type("Mine", (CleanFineTuning,), {function: value})(pretrained=str(tiny_model)))


def _fit(method: RobustMethod) -> None:
    data = CLIPDataModule(train="shapes:source", image_size=32, batch_size=2, holdout=0)
    quick_trainer(max_steps=1, limit_val_batches=0).fit(method, data)
