"""Logits of labels that are a part of the class names, or the best of several: masks and projections written out."""

from pathlib import Path

import method_cases as cases
import pytest
import torch

from robustclip.attacks import PGD
from robustclip.methods import FineTuning, ZeroShot
from robustclip.models.heads import encode_heads, head_logits
from robustclip.types import Task

NAMES = ("ant", "bee", "cat", "dog", "elk")
MASK = ((1,), (4,))  # as of ImageNet-R and -A: the logits of the other classes do not take part
PROJECTION = ((3,), (0, 2), (4, 1, 2))  # as of ObjectNet: the highest logit of the mapped classes


def head_of(groups: tuple[tuple[int, ...], ...] | None, features: torch.Tensor) -> torch.Tensor:
    return encode_heads(lambda _: features, [Task("task", NAMES, groups=groups)])["task"]


def test_masked_and_projected_logits_are_those_of_the_rule() -> None:
    torch.manual_seed(0)
    images, words, scale = torch.randn(7, 6), torch.randn(5, 6), torch.tensor(3.0)
    z = (3 * images @ words.T).tolist()
    whole = head_logits(images, head_of(None, words), scale)
    torch.testing.assert_close(whole, torch.tensor(z))
    masked = head_logits(images, head_of(MASK, words), scale)
    torch.testing.assert_close(masked, torch.tensor([[row[1], row[4]] for row in z]))
    projected = head_logits(images, head_of(PROJECTION, words), scale)
    by_rule = [[row[3], max(row[0], row[2]), max(row[4], row[1], row[2])] for row in z]
    torch.testing.assert_close(projected, torch.tensor(by_rule))


def test_a_masked_class_cannot_win() -> None:
    words = torch.eye(5)
    image = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.3]])  # a cat, which has no label
    assert head_logits(image, head_of(MASK, words), torch.tensor(1.0)).argmax() == 1
    assert head_logits(image, head_of(((0,), (1, 3), (4,)), words), torch.tensor(1.0)).argmax() == 1


def test_tasks_of_the_same_words_are_encoded_once() -> None:
    calls: list[str] = []

    def encode(task: Task) -> torch.Tensor:
        calls.append(task.name)
        return torch.eye(len(task.class_names), 5)

    heads = encode_heads(encode, [Task("a", NAMES), Task("b", NAMES, groups=MASK), Task("c", NAMES[:3])])
    assert calls == ["a", "c"]
    assert {name: tuple(head.shape) for name, head in heads.items()} == {"a": (5, 5), "b": (2, 1, 5), "c": (3, 5)}


def test_attacks_go_through_the_maximum(tiny_model: Path) -> None:
    method, data = cases.make(ZeroShot, tiny_model), cases.batch()
    groups = ((0, 2), (1,))
    method.prepare([Task("grouped", cases.TASK.class_names, cases.TASK.templates, groups)])
    z = cases.logits(method, data.images)
    with torch.no_grad():
        torch.testing.assert_close(
            method.logits(data.images, "grouped"), torch.stack([torch.maximum(z[:, 0], z[:, 2]), z[:, 1]], 1)
        )
    labels, attack = torch.tensor([0, 1, 0, 1]), PGD(eps="2/255", alpha="1/255", steps=1, random_start=False)
    attacked = attack(data.images, lambda images: method.logits(images, "grouped"), labels)
    images = data.images.clone().requires_grad_()
    z = cases.logits(method, images)
    grouped = torch.stack([torch.where(z[:, 0] > z[:, 2], z[:, 0], z[:, 2]), z[:, 1]], 1)
    (gradient,) = torch.autograd.grad(cases.cross_entropy(grouped, labels).sum(), images)
    by_hand = (data.images + gradient.sign() / 255).clamp(0, 1)
    assert ((by_hand - attacked).abs() > 1e-6).float().mean() < 1e-2  # signs of rounding errors


def test_a_trained_classifier_answers_for_parts_of_its_classes(tiny_model: Path) -> None:
    method, images = cases.make(FineTuning, tiny_model), cases.batch().images
    method.prepare([Task("part", cases.TASK.class_names, ("a sketch of a {}",), ((2,), (0,)))])
    with torch.no_grad():
        z = cases.unit(cases.embed(method, images)) @ method.classifier.T
        torch.testing.assert_close(method.logits(images, "part"), z[:, [2, 0]])


@pytest.mark.parametrize("groups", [((0,), ()), ((5,),), ((-1, 0),)])
def test_groups_of_no_class_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="a group of task 'task' must hold positions among the 5 class names, got"):
        Task("task", NAMES, groups=groups)
