"""Mistakes in the functions of a user's defence or of a method's logits end in one line that names the function."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_trainer

from robustclip import CLIPDataModule
from robustclip.attacks import PGD
from robustclip.defences import Defence
from robustclip.evaluation import RobustEvaluation
from robustclip.evaluation.defended_model import Way
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.types import Task


def answers(change: Any) -> Any:
    """Makes a `forward` that changes the logits."""
    return lambda self, method, images, task, *, index, draw: change(method.logits(images, task))


def images(change: Any) -> Any:
    """Makes a `purify` that changes the images."""
    return lambda self, method, images, task, *, index, draw: change(images)


# Function that replaces one of a defence, and the parts of the message.
MISTAKES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "images alone": ("purify", lambda self, images: images, ("Mine.purify(images) must take (method", "draw: int")),
    "by position": ("forward", lambda self, method, images, task, index: images, ("Mine.forward(", "draw")),
    "no function": ("purify", 3, ("Mine.purify must be a function, got 3",)),
    "a class too many": (
        "forward",
        answers(lambda z: torch.cat([z, z[:, :1]], 1)),
        ("(B, C), here (2, 12)", "(2, 13)"),
    ),
    "unreduced views": ("forward", answers(lambda z: torch.cat([z, z])), ("(B, C), here (2, 12)", "(4, 12)")),
    "no logits": ("forward", answers(lambda z: None), ("Mine.forward must return a tensor", "got NoneType")),
    "classes": ("forward", answers(lambda z: z.argmax(1)), ("Mine.forward", "(2,)")),
    "an array": ("forward", answers(lambda z: z.detach().numpy()), ("Mine.forward", "got ndarray of shape (2, 12)")),
    "no images": ("purify", images(lambda x: None), ("Mine.purify must return a tensor", "got NoneType")),
    "smaller images": ("purify", images(lambda x: x[..., 1:]), ("(B, 3, H, W)", "(2, 3, 32, 31)")),
    "grey images": ("purify", images(lambda x: x.mean(1)), ("Mine.purify", "(2, 32, 32)")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, tiny_model: Path) -> None:
    function, value, parts = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        _test(ZeroShot(pretrained=str(tiny_model), defence=type("Mine", (Defence,), {function: value})()))
    for part in parts[1:]:
        assert part in str(caught.value)


def test_a_surrogate_of_another_shape_is_named(tiny_model: Path) -> None:
    method = ZeroShot(
        pretrained=str(tiny_model),
        defence=type("Mine", (Defence,), {"surrogate": images(lambda x: x.mean((1, 2, 3)))})(),
    )
    method.prepare([Task("colours", ("red", "blue"), ("a {}",))])
    logits = Way(method, "colours", "surrogate", [0])(torch.rand(2, 3, 32, 32, requires_grad=True))
    with pytest.raises(ValueError, match=re.escape("Mine.surrogate must return a tensor of shape (B, C)")):
        logits.sum().backward()


@pytest.mark.parametrize("change", [lambda z: torch.cat([z, z[:, :1]], 1), lambda z: z.amax(1), lambda z: None])
def test_logits_of_another_shape_are_named(change: Any, tiny_model: Path) -> None:
    mine = type("Mine", (ZeroShot,), {"logits": lambda self, x, task="train": change(ZeroShot.logits(self, x, task))})
    with pytest.raises(ValueError, match=re.escape("Mine.logits must return a tensor of shape (B, C), here (2, 12)")):
        _test(mine(pretrained=str(tiny_model)))


def test_a_defence_may_change_its_images_in_place(tiny_model: Path) -> None:
    method = ZeroShot(pretrained=str(tiny_model))
    method.prepare([Task("colours", ("red", "blue"), ("a {}",))])
    for function, value in (("purify", images(lambda x: x.mul_(0.5))), ("forward", answers(lambda z: z.mul_(2)))):
        method.defence = type("Mine", (Defence,), {function: value})()
        given = torch.rand(2, 3, 32, 32)
        before = given.clone()
        method.answers(given, "colours")
        method.defence.purified(method, given, "colours", index=None, draw=0)
        assert torch.equal(given, before)


def _test(method: RobustMethod) -> None:
    data = CLIPDataModule(test=["shapes:outlines"], image_size=32, eval_batch_size=2)
    evaluation = RobustEvaluation({"pgd": PGD("5/255", "2/255", 2)}, max_samples=2)
    quick_trainer(evaluation).test(method, data)
