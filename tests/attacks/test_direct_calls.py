"""An attack that is called outside of the evaluation computes no sample that an earlier run has misclassified."""

import pytest
import torch
from torch import Tensor
from victims import learnt

from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, perturbation_set
from robustclip.attacks.attack import SkipsMisclassified

IDS = torch.arange(300)


class Counted:
    """The model, with the number of samples that it has computed."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.samples += len(images)
        outputs: Tensor = learnt().model(images)
        return outputs


class Whole(Counted, SkipsMisclassified):
    """The same model, computed on every sample."""


@pytest.mark.parametrize(
    ("attack", "most"),
    [(APGD(8 / 255, 10, targets=5, loss="dlr"), 0.8), (APGD(8 / 255, 10, restarts=4), 0.8), (Square(0.1, 400), 0.6)],
)
def test_misclassified_images_are_not_attacked_further_and_stay_unchanged(attack: Attack, most: float) -> None:
    victim, model, whole = learnt(), Counted(), Whole()
    images = attack(victim.images, model, victim.labels, index=IDS)
    expected = attack(victim.images, whole, victim.labels, index=IDS)
    is_wrong, was_wrong = (victim.model(found).argmax(1) != victim.labels for found in (images, expected))
    assert torch.equal(is_wrong, was_wrong)
    assert torch.allclose(images, expected, atol=1e-6)
    assert model.samples < most * whole.samples


ALL = [
    attack
    for norm, eps in (("linf", 0.05), ("l2", 0.5), ("l1", 4.0))
    for attack in (PGD(eps, eps / 4, 2, norm), APGD(eps, 3, norm), Square(eps, 5, norm), Recipe("cascade", eps, norm))
]


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: f"{type(attack).__name__} {attack.norm}")
def test_images_of_float64_none_and_half_precision(attack: Attack) -> None:
    victim, attack = learnt(), attack.scaled(steps=1) if not isinstance(attack, Recipe) else attack.scaled(steps=0.01)
    images, labels = victim.images[:4].double(), victim.labels[:4]
    attacked = attack(images, lambda x: victim.model(x.float()), labels, index=IDS[:4])
    assert attacked.dtype == torch.float64
    assert perturbation_set.distance(attacked, images, attack.norm).max() <= attack.eps * (1 + 1e-6)
    assert attack(images[:0], victim.model, labels[:0], index=IDS[:0]).shape == images[:0].shape
    for dtype in (torch.bfloat16, torch.float16, torch.uint8):
        with pytest.raises(ValueError, match=rf"images of float32 or float64, .*, got {str(dtype)[6:]}; convert them"):
            attack(images.to(dtype), victim.model, labels)
