"""An attack that is called outside of the evaluation computes no sample that an earlier run has misclassified."""

import pytest
import torch
from torch import Tensor
from victims import learnt

from robustclip.attacks import APGD, Attack, Square
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
