"""AGFT's training step against the worked numbers of its specification, made with the authors' code, and its limits."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from method_cases import linear
from torch import Tensor, tensor

from robustclip.attacks import PGD
from robustclip.methods import AGFT, TeCoA
from robustclip.types import UNKNOWN, Batch

STUDENT = [[0.9, 0.2], [-0.1, 1.1]]
TEXTS = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
IMAGES = [[0.8, 0.6], [0.28, 0.96]]
SAME = [[1.0, 0.0], [0.0, 1.0]]
NONE = PGD(eps=0.0, alpha=0.0, steps=0, random_start=False)


def step(model: Path, student: list[list[float]], labels: tuple[int, ...] = (0, 2), **options: Any) -> Any:
    """Loss, gradient and attacked images of a linear tower on images of two pixels."""
    method, batch = linear(AGFT, model, student=student, images=IMAGES, texts=TEXTS, labels=labels, **options)
    loss = method.training_loss(batch)["alignment"]
    (gradient,) = torch.autograd.grad(loss, method.weight)
    return float(loss.detach()), gradient, method.attack.images.flatten(1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": 10.0}, 1.0431634007),
        ({"scale": 10.0, "gamma": 1.0}, 0.6199956704),
        ({"scale": 180.0}, 0.3325712257),
    ],
)
def test_the_loss_at_the_original_tower(tiny_model: Path, options: Any, expected: float) -> None:
    assert step(tiny_model, SAME, attack=NONE, **options)[0] == pytest.approx(expected, abs=1e-9)


def test_loss_and_gradient_at_another_tower(tiny_model: Path) -> None:
    loss, gradient, _ = step(tiny_model, STUDENT, scale=10.0, attack=NONE)
    assert loss == pytest.approx(1.0403661159, abs=1e-9)
    expected = tensor([[0.0492910133, 0.2416463010], [0.0062769760, -0.0836940678]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("labels", [(0, 2), (1, 1), (UNKNOWN, UNKNOWN)])
def test_the_attack_follows_the_soft_targets_and_no_label(tiny_model: Path, labels: tuple[int, ...]) -> None:
    attack = PGD(eps=0.1, alpha=0.06, steps=2, random_start=False)
    loss, gradient, images = step(tiny_model, STUDENT, labels, scale=10.0, attack=attack)
    torch.testing.assert_close(images, tensor([[0.7, 0.7], [0.38, 0.86]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert loss == pytest.approx(1.1561125598, abs=1e-9)
    expected = tensor([[-0.0707632609, 0.2339482679], [0.2066372575, 0.0341463700]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_a_small_gamma_gives_uniform_targets(tiny_model: Path) -> None:
    assert step(tiny_model, STUDENT, scale=10.0, gamma=1e-9, attack=NONE)[0] == pytest.approx(2.2568700041, abs=1e-7)


def test_a_large_gamma_at_the_own_scale_is_tecoa_on_pseudo_labels(tiny_model: Path) -> None:
    ours = cases.make(AGFT, tiny_model, gamma=1e5, scale=1.0)
    ours.scale = ours.clip.logit_scale
    theirs = cases.make(TeCoA, tiny_model)
    data = cases.batch()
    answers = (ours.teacher.encode_image(data.images) @ ours.head().T).argmax(-1)
    expected = theirs.training_loss(data._replace(labels=answers))["adversarial_ce"]
    torch.testing.assert_close(ours.training_loss(data)["alignment"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.attack.images, theirs.attack.images, rtol=0, atol=1e-6)


def test_value_and_gradient_are_those_of_the_formula(tiny_model: Path) -> None:
    method, data = cases.make(AGFT, tiny_model), cases.batch()
    texts, own = method.head().double(), 1.8 * float(method.clip.logit_scale)
    targets = (0.4 * own * method.teacher.encode_image(data.images).double() @ texts.T).softmax(-1)

    def expected(twin: Any, _: Tensor, attacked: Tensor) -> Tensor:
        logits = own * cases.unit(cases.embed(twin, attacked)) @ texts.T
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_the_own_scale_answers_in_evaluation(tiny_model: Path) -> None:
    one, other = (cases.make(AGFT, tiny_model, scale=scale) for scale in (5.0, 500.0))
    images = cases.batch().images
    assert torch.equal(one.logits(images), other.logits(images))
    assert torch.equal(one.logits(images), cases.make(TeCoA, tiny_model).logits(images))


def test_images_without_label_are_accepted_and_pseudo_labels_refused(tiny_model: Path) -> None:
    data = cases.batch()
    unlabelled = Batch(data.images, torch.full_like(data.labels, UNKNOWN), data.index)
    method = cases.make(AGFT, tiny_model)
    assert torch.equal(method.training_loss(data)["alignment"], method.training_loss(unlabelled)["alignment"])
    assert AGFT.takes_unknown
    with pytest.raises(ValueError, match="pseudo_labels must be false for AGFT"):
        AGFT(pretrained=str(tiny_model), pseudo_labels=True)
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        AGFT(pretrained=str(tiny_model), gamma=0.0)
